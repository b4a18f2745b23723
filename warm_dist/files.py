"""Atomic file replacement, JSON, sha256, and the file lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from warm_dist.errors import OutputError, writing

_LOCK_POLL_S = 0.05


def make_folder(path: Path) -> None:
    """Create a folder and its parents if missing. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made ({error.strerror})") from None


def replace_file(path: Path, write: Callable[[Path], object], *, parents: bool = True) -> None:
    """Replace a file atomically: `write` fills a temporary file beside it, which is then renamed.

    Readers see the old file or the new one, never a part. parents: create the folder if missing. Raises OutputError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            if parents:
                path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):  # after success there is nothing to remove
                temporary.unlink()


def write_json(path: Path, tree: Any) -> None:
    """Replace a JSON file atomically, in a folder that exists. Raises OutputError."""
    text = json.dumps(tree, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), parents=False)


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it does not exist or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def locked(path: Path, wait_s: float = 0.0) -> IO[str]:
    """Open a file for reading and writing, created if missing, and lock it: `with locked(path): ...`.

    The lock is released when the file is closed or the process ends, however it ends.
    wait_s: how long to wait for another holder, seconds (math.inf: forever). Raises BlockingIOError if another process
    still holds the lock then, other OSErrors as `open` does.
    """
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")  # noqa: SIM115  # the caller's
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait_s == math.inf else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise
        except OSError:
            file.close()
            raise
        time.sleep(_LOCK_POLL_S)


def claimed(folder: Path, who: str, lock: str = ".lock") -> IO[str]:
    """Create a folder and lock the file `lock` in it: `with claimed(folder, "sweep"): ...`.

    who: what else may hold it, for the message. Raises OutputError if the folder cannot be written or is locked.
    """
    with writing(folder, "; choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return locked(folder / lock)
        except BlockingIOError:
            raise OutputError(
                f"{folder}: another {who} is using it; stop that first, or choose another folder"
            ) from None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
