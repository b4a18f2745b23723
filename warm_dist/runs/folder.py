"""A run's folder: the names of its files, the lock of the process that trains in it, and exit.json at its end."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field

from warm_dist.config.load import dump
from warm_dist.config.run import Config
from warm_dist.errors import OutputError, WarmDistError, kind_of, print_once, redact, writing
from warm_dist.files import claimed, create_file, read_json, write_json
from warm_dist.records import Record, digest, read_record, seal, write_record

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
_REASON_CHARACTERS = 2000  # of exit.json; each takes at most 6 bytes
_END_BYTES = 16 << 10


class Attempt(Record):
    """run.json: the attempt under way or the last one, and facts about it."""

    attempt: int
    commit: str = "unknown"
    fingerprint: str | None = None  # of the data
    world_size: int | None = None
    zero_stage: int | None = None
    num_parameters: int | None = None
    device: str | None = None
    config_sha256: str | None = None  # of config.json's content


class End(Record):
    """exit.json: how an attempt ended. code: the process's exit code. resumable: the same command goes on."""

    code: int
    reason: str
    nimg: int = 0
    resumable: bool = False
    attempt: int = 0


class Mirrored(Record):
    """mirror.json: the MLflow run, the bytes of metrics.jsonl that it has, and up to where a part was being sent."""

    run_id: str
    offset: Annotated[int, Field(ge=0)]
    sending: Annotated[int, Field(ge=0)] | None = None


class Claim:
    """A process's part in a run's folder. attempt: counts the starts, from 1, on the rank that holds the lock."""

    def __init__(self, run: Path, lock: IO[str] | None = None, attempt: int = 0) -> None:
        self.run, self.attempt, self._lock, self._seen = run, attempt, lock, _identity(run / LOCK)
        with suppress(OSError):  # the space for exit.json: a disk that is full at the end still holds it
            _reserved(run).write_bytes(bytes(_END_BYTES))

    @classmethod
    def take(cls, run: Path) -> Claim:
        """Create and lock the folder, and remove the last exit.json. Rank 0 only.

        Raises OutputError if the folder cannot be written or another process trains in it.
        """
        lock = claimed(run, "training process", LOCK)
        with writing(run / EXIT):
            for old in (run / EXIT, *run.glob(".exit.*")):
                old.unlink(missing_ok=True)
        return cls(run, lock, attempt_of(run) + 1)

    def check(self) -> None:
        """Raise OutputError if the folder was removed or replaced meanwhile: what is there is not this run's."""
        if self._seen and self._seen != _identity(self.run / LOCK):
            raise OutputError(
                f"{self.run}: was removed or replaced while this run trained in it; nothing more is written there"
            )

    def end(self, attempt: int, nimg: int, error: BaseException | None) -> None:
        """As `write_end`, unless the folder is no longer this run's."""
        with suppress(OutputError):
            self.check()
            write_end(self.run, attempt, nimg, error)

    @classmethod
    def end_unclaimed(cls, run: Path, error: BaseException) -> None:
        """As `end`, for a process that ended before it could take the folder; nothing if another one trains in it."""
        with suppress(OutputError):
            claim = cls.take(run)
            claim.end(claim.attempt, 0, error)
            claim.release()

    def release(self) -> None:
        """Remove what was kept for exit.json, and release the lock."""
        with suppress(OSError, OutputError):
            self.check()
            _reserved(self.run).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def attempt_of(run: Path) -> int:
    """The attempt in run.json, 0 if there is none."""
    last = read_record(run / RUN, Attempt)
    return last.attempt if last else 0


def describe_run(run: Path, config: Config, attempt: int, facts: dict[str, Any]) -> None:
    """Write config.json and run.json. Raises OutputError."""
    tree = dump(config)
    write_json(run / CONFIG, tree)
    write_record(run / RUN, {"attempt": attempt, "commit": git_commit(), **facts, "config_sha256": digest(tree)})


def read_config(run: Path) -> dict[str, Any] | None:
    """The content of config.json; None if there is none, or another than the run wrote, which is told once."""
    tree, attempt = read_json(run / CONFIG), read_record(run / RUN, Attempt)
    if not isinstance(tree, dict):
        return None
    if attempt and attempt.config_sha256 not in (None, digest(tree)):
        print_once(f"{run / CONFIG}: differs from what the run wrote; passed over")
        return None
    return tree


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


def read_end(run: Path, *, attempt: int = 0, since: float = 0.0) -> End | None:
    """Read exit.json if it is from `attempt` or later and was written after `since` (Unix time), else None.

    Without these conditions an earlier attempt's end could be mistaken for this one's.
    """
    end = read_record(run / EXIT, End)
    if end is None or end.attempt < attempt:
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
        "reason": "finished" if error is None else redact(f"{kind_of(error)}: {error}")[:_REASON_CHARACTERS],
        "nimg": nimg,
        "resumable": isinstance(error, WarmDistError) and error.resumable,
        "attempt": attempt,
    }
    with suppress(OSError):
        create_file(run / EXIT, seal(tree), _reserved(run))


def _reserved(run: Path) -> Path:
    return run / f".exit.{socket.gethostname()}.{os.getpid()}"  # two containers may share a pid


def write_results(out: Path, cells: dict[str, dict[str, Any]]) -> None:
    """Write results.json: cells by their key, each with the digest of its content. Raises OutputError."""
    write_json(out / RESULTS, {key: {**cell, "digest": digest(cell)} for key, cell in cells.items()})


def read_results(out: Path) -> dict[str, dict[str, Any]] | None:
    """The cells of results.json; None if it cannot be read. One that differs from what was written is left out and told."""
    tree = read_json(out / RESULTS)
    if not isinstance(tree, dict):
        return None
    cells = {}
    for key, cell in tree.items():
        if not isinstance(cell, dict):
            continue
        if "digest" in cell and cell.pop("digest") != digest(cell):
            print_once(f"{out / RESULTS}: the cell {key} differs from what was written; passed over")
        else:
            cells[key] = cell
    return cells
