"""Files replaced atomically and durably, JSON, sha256, and the file lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from warm_dist import supervisor
from warm_dist.errors import OutputError, print_once, writing

_LOCK_POLL_S = 0.05
_LONGEST_S = 60.0  # to wait for another machine's lock file, which may be that of a process long gone
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM, errno.EINVAL)


def make_folder(path: Path) -> None:
    """Create a folder and its parents if missing; a power cut afterwards does not undo it. Raises OutputError."""
    try:
        make_durably(path)
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"{path}: cannot be made, since it or a folder above it is a file; move that away") from None
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
                try:
                    file.write(data)
                    file.flush()
                except OSError:
                    path.unlink(missing_ok=True)
                    raise
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

    The lock is released when the file is closed or the process ends, however it ends. On a file system that cannot lock
    (Lustre without flock, some FUSE and SMB) a second file, .held.NAME beside it, names the holder until the file is closed; it is
    removed when that process of this machine has ended, and where another machine left it, the error names it.
    wait_s: how long to wait for another holder, seconds (math.inf: forever). Raises BlockingIOError if another process
    still holds the lock then, other OSErrors as `open` does.
    """
    file = open(open_regular(path, os.O_RDWR | os.O_CREAT), "r+", encoding="utf-8")  # noqa: SIM115  # the caller's
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait_s == math.inf else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise
        except OSError as error:
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            return _held(path, str(error.strerror), deadline)
        time.sleep(_LOCK_POLL_S)


class _Held(io.TextIOWrapper):
    """An open file whose lock is another file, removed when it is closed."""

    holder: Path

    def close(self) -> None:
        if not self.closed:
            self.holder.unlink(missing_ok=True)
        super().close()


def _held(path: Path, why: str, deadline: float) -> IO[str]:
    """As `locked`, by creating .held.NAME with the name of this machine and process."""
    print_once(f"{path.parent}: this file system cannot lock ({why}); files .held.* there name who holds what")
    holder, here = path.with_name(f".held.{path.name}"), socket.gethostname()
    deadline = min(deadline, time.monotonic() + _LONGEST_S)
    while True:
        try:
            descriptor = os.open(holder, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # released, or taken over by another process
                text = holder.read_text(encoding="utf-8", errors="replace")
                host, _, who = text.rpartition(" ")
                if host == here and not supervisor.alive(who):
                    _bury(holder, text)
                    continue
                if time.monotonic() >= deadline:
                    owner = f"process {who.split(':')[0]} on {host or 'a machine unknown'}"
                    raise BlockingIOError(errno.EAGAIN, f"{owner} holds it; if that is gone, remove {holder}") from None
            time.sleep(_LOCK_POLL_S)
            continue
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{here} {supervisor.identity(os.getpid())}")
        held = _Held(path.open("r+b"), encoding="utf-8")
        held.holder = holder
        return held


def _bury(holder: Path, text: str) -> None:
    """Remove a dead process's holder file, unless another process has taken it over since it was read."""
    grave = holder.with_name(f".{holder.name}.{os.getpid()}")
    holder.rename(grave)
    if grave.read_text(encoding="utf-8") == text:
        grave.unlink()
    else:
        grave.rename(holder)


def claimed(folder: Path, who: str, lock: str = ".lock") -> IO[str]:
    """Create a folder and lock the file `lock` in it: `with claimed(folder, "sweep"): ...`.

    who: what else may hold it, for the message. Raises OutputError if the folder cannot be written or is locked.
    """
    with writing(folder, "; choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return locked(folder / lock)
        except BlockingIOError as error:
            holder = f" ({error.strerror})" if "holds it" in str(error.strerror) else ""
            raise OutputError(
                f"{folder}: another {who} is using it{holder}; stop that first, or choose another folder"
            ) from None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
