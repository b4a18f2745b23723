"""Files replaced atomically and durably, JSON, sha256, and the file lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from warm_dist.errors import OutputError, writing

_LOCK_POLL_S = 0.05


def make_folder(path: Path) -> None:
    """Create a folder and its parents if missing; a power cut afterwards does not undo it. Raises OutputError."""
    try:
        make_durably(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made ({error.strerror})") from None


def make_durably(path: Path) -> None:
    """As `make_folder`. Raises OSError."""
    if not path.is_dir():
        if path != path.parent:
            make_durably(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, has reached the disk. Raises OSError.

    Some network file systems cannot sync a folder; there nothing more can be done.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) and path.is_dir()):
            raise
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[Path], object], *, parents: bool = True) -> None:
    """Replace a file atomically and durably: `write` fills a temporary file beside it, which is then renamed.

    Readers see the old file or the new one, never a part, and so does who reads after a power cut.
    parents: create the folder if missing. Raises OutputError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            if parents:
                make_durably(path.parent)
            write(temporary)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            with contextlib.suppress(OSError):  # after success there is nothing to remove
                temporary.unlink()


def create_file(path: Path, data: bytes, temporary: Path) -> None:
    """Create a file atomically and durably by way of `temporary`, whose space is used if it exists.

    Raises FileExistsError if there is one already, other OSErrors as `open` and `write` do.
    """
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            file.write(data)
            file.truncate()
        sync(temporary)
        try:
            os.link(temporary, path)  # unlike a rename, fails if it exists
        except FileExistsError:
            raise
        except OSError:  # exFAT, SMB and many FUSE file systems have no hard links
            with path.open("xb") as file:
                file.write(data)
            sync(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, tree: Any) -> None:
    """Replace a JSON file, in a folder that exists. Raises OutputError."""
    text = json.dumps(tree, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), parents=False)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file. Raises OSError, also for a folder, a FIFO or a device, on which it never waits."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_regular(path: Path, most: int | None = None) -> bytes:
    """A regular file's content. most: of bytes. Raises OSError as `open_regular`, and if it is longer than `most`."""
    with open(open_regular(path), "rb") as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"longer than {most} bytes", str(path))
        return file.read()


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it does not exist or is not JSON."""
    try:
        return json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
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
