"""A run's folder: the names of its files, the lock of the process that trains in it, and exit.json at its end."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import IO, Any

from warm_dist.config.load import dump
from warm_dist.config.run import Config
from warm_dist.errors import OutputError, WarmDistError, redact
from warm_dist.files import claimed, read_json, write_json

CONFIG = "config.json"  # every key, defaults included
RUN = "run.json"  # the attempt and facts about it
METRICS = "metrics.jsonl"
EXIT = "exit.json"
LOCK = ".lock"
EXPORTS = "weights"  # the folder of exported weights
WEIGHTS = f"{EXPORTS}/ema.safetensors"
SAMPLES = "samples"  # the folder of sample grids, NIMG.png
MIRROR = "mirror.json"  # what MLflow has received
RESULTS = "results.json"  # in the --out folder of launch/evaluate.py, not a run's


def claim_run(run: Path) -> tuple[int, IO[str]]:
    """Create and lock the folder, count the attempt, and remove the last exit.json. Rank 0 only.

    Returns the attempt (from 1) and the open lock, which the process holds until it ends.
    Raises OutputError if the folder cannot be written or another process trains in it.
    """
    lock = claimed(run, "training process", LOCK)
    (run / EXIT).unlink(missing_ok=True)
    return attempt_of(run) + 1, lock


def attempt_of(run: Path) -> int:
    """The attempt in run.json, 0 if there is none."""
    last = read_json(run / RUN)
    return int(last.get("attempt", 0)) if isinstance(last, dict) else 0


def describe_run(run: Path, config: Config, attempt: int, facts: dict[str, Any]) -> None:
    """Write config.json and run.json. Raises OutputError."""
    write_json(run / CONFIG, dump(config))
    write_json(run / RUN, {"attempt": attempt, "commit": git_commit(), **facts})


def git_commit() -> str:
    """The checked-out commit, with "+" appended if files differ from it; "unknown" outside a git checkout."""
    here = ["git", "-C", str(Path(__file__).resolve().parent)]

    def git(*arguments: str) -> str:
        return subprocess.run(
            [*here, *arguments], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def read_end(run: Path, *, attempt: int = 0, since: float = 0.0) -> dict[str, Any] | None:
    """Read exit.json if it is from `attempt` or later and was written after `since` (Unix time), else None.

    Without these conditions an earlier attempt's end could be mistaken for this one's.
    """
    end = read_json(run / EXIT)
    if not isinstance(end, dict) or end.get("attempt", 0) < attempt:
        return None
    try:
        return end if (run / EXIT).stat().st_mtime >= since - 1 else None  # file systems' clocks are coarse
    except FileNotFoundError:  # a new attempt has just started
        return None


def write_end(run: Path, attempt: int, nimg: int, error: BaseException | None) -> None:
    """Write exit.json unless it exists: the rank that failed is first, ranks that then lose a peer add nothing."""
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
        os.link(temporary, run / EXIT)  # unlike a rename, fails if it exists
    except (FileExistsError, OutputError):
        pass
    finally:
        temporary.unlink(missing_ok=True)
