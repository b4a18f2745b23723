"""A run's folder: claimed by one process at a time, and ending in exit.json whatever happens."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
from pathlib import Path
from typing import Any, TextIO

from warm_dist.config.load import dump
from warm_dist.config.run import Config
from warm_dist.errors import OutputError, WarmDistError, redact
from warm_dist.files import read_json, write_json


def claim_run(run: Path) -> tuple[int, TextIO]:
    """Make the folder, take its lock, count the attempt, remove the last exit.json. Rank 0 only.

    Returns the attempt (1 the first time) and the open lock, held until the process ends.
    Raises OutputError if it cannot be written or another process trains in it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("a+")
    except OSError as error:
        raise OutputError(f"{run}: cannot be written ({error.strerror}); set output to a folder of yours") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OutputError(f"{run}: another process is training in it; wait for it, or set output elsewhere") from None
    (run / "exit.json").unlink(missing_ok=True)
    last = read_json(run / "run.json")
    return (last["attempt"] if isinstance(last, dict) else 0) + 1, lock


def describe_run(run: Path, config: Config, attempt: int, facts: dict[str, Any]) -> None:
    """Write config.json (every key, defaults included) and run.json."""
    write_json(run / "config.json", dump(config))
    write_json(run / "run.json", {"attempt": attempt, "commit": git_commit(), **facts})


def git_commit() -> str:
    """The checked-out commit, "+" appended if files differ from it; "unknown" outside a git checkout."""
    source = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def end_since(run: Path, since: float) -> dict[str, Any] | None:
    """exit.json, if it was written after `since` (seconds of the epoch): an earlier attempt's may still be there."""
    told = read_json(run / "exit.json")
    if not isinstance(told, dict) or (run / "exit.json").stat().st_mtime < since - 1:  # file systems' clocks are coarse
        return None
    return told


def write_end(run: Path, attempt: int, nimg: int, error: BaseException | None) -> None:
    """Write exit.json. The first to write keeps it: the rank that failed, not those that then lost their peer."""
    code = 0 if error is None else error.exit_code if isinstance(error, WarmDistError) else 1
    tree = {
        "code": code,
        "reason": "finished" if error is None else redact(f"{type(error).__name__}: {error}"),
        "nimg": nimg,
        "resumable": isinstance(error, WarmDistError) and error.resumable,
        "attempt": attempt,
    }
    temporary = run / f".exit.{socket.gethostname()}.{os.getpid()}"  # two containers may share a pid
    try:
        write_json(temporary, tree)
        os.link(temporary, run / "exit.json")  # fails if it exists, unlike a rename
    except (FileExistsError, OutputError):
        pass
    finally:
        temporary.unlink(missing_ok=True)
