"""One small interface to S3 and to local folders, and one clear message for each way that storage fails."""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from warm_dist.errors import AccessError, ConfigError, DataError, OutputError

PIECE_BYTES = 32 << 20  # of a download
PARTIAL = ".partial"  # the name of a file until it is whole
_OWN_PARTIAL = re.compile(r"\.(.+)\.\d+\.partial")


class Stat(NamedTuple):
    """Size in bytes and the tag that changes whenever the object is replaced."""

    size: int
    etag: str


def open_store(url: str, endpoint_url: str | None = None) -> Store:
    """A store for `s3://bucket/prefix`, `file:///folder` or a folder's path; touches neither network nor disk.

    endpoint_url: an S3 endpoint other than AWS's own. boto3's own chain finds the credentials.
    Raises ConfigError for a placeholder bucket or an unknown scheme.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FileStore(Path(url))
    if scheme == "file":
        return FileStore(Path(urlsplit(url).path))
    if scheme != "s3":
        raise ConfigError(f"{url}: unknown scheme {scheme!r}; use s3://bucket/prefix or a local path")
    from data_pipelines.s3_store import S3Store  # it builds on this module

    bucket, _, prefix = rest.partition("/")
    return S3Store(bucket, prefix, endpoint_url)


def split_url(url: str) -> tuple[str, str]:
    """The folder's URL and the last name: `s3://bucket/a/manifest.parquet` → (`s3://bucket/a`, `manifest.parquet`)."""
    folder, separator, name = url.rpartition("/")
    return (folder or "/", name) if separator else (".", name)


class Store(ABC):
    """Objects under one URL. Paths are relative to it and use forward slashes; safe to share between threads."""

    url: str

    @abstractmethod
    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        """`length` bytes from `start` (None: to the end).

        etag: of the only acceptable version. Raises DataError if the object is missing, replaced or too short.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Create or replace an object at once: readers see the old one or the new one, never a part."""

    @abstractmethod
    def upload(self, path: str, local_file: Path) -> None:
        """`write` for a file of any size, which need not fit into memory."""

    @abstractmethod
    def stat(self, path: str) -> Stat:
        """Size and tag. Raises DataError if there is no such object."""

    @abstractmethod
    def list(self, prefix: str = "") -> dict[str, Stat]:
        """All objects whose paths begin with `prefix`, sorted by path."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove an object; harmless if it does not exist."""

    @abstractmethod
    def discard_partials(self, ours: re.Pattern[str]) -> None:
        """Remove what killed writers left of objects whose whole path matches `ours`; what is just being written goes too."""

    def forget(self, path: str, start: int, length: int, etag: str) -> bool:
        """Drop copies of these bytes, which turned out wrong, so that they are fetched anew; True if there were any."""
        return False

    def held_bytes(self, length: int) -> int:
        """Most memory that `read` takes for so many bytes, until the caller lets its result go."""
        return length

    def download(self, path: str, local_file: Path) -> None:
        """Copy an object of any size to a local file, piece by piece, all from the same version of it."""
        size, etag = self.stat(path)
        with output(local_file), local_file.open("wb") as out:
            for start in range(0, size, PIECE_BYTES):
                out.write(self.read(path, start, min(PIECE_BYTES, size - start), etag))


class FileStore(Store):
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser()
        self.url = str(self.root)

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        target = self.root / path
        with self._input(target), target.open("rb") as file:
            if etag is not None and self._tag(os.fstat(file.fileno())) != etag:
                raise DataError(f"{target}: was replaced since it was first looked at")
            file.seek(start)
            data = file.read(-1 if length is None else length)
        if length is not None and len(data) < length:
            raise too_short(str(target), start, length, start + len(data))
        return data

    def write(self, path: str, data: bytes) -> None:
        with self._replacing(path) as partial:
            partial.write_bytes(data)

    def upload(self, path: str, local_file: Path) -> None:
        with self._replacing(path) as partial:
            shutil.copyfile(local_file, partial)

    def stat(self, path: str) -> Stat:
        with self._input(self.root / path):
            stat = (self.root / path).stat()
            return Stat(stat.st_size, self._tag(stat))

    def list(self, prefix: str = "") -> dict[str, Stat]:
        out = {}
        for folder, _, names in os.walk(self.root / prefix.rpartition("/")[0]):
            for name in names:
                path = (Path(folder) / name).relative_to(self.root).as_posix()
                if path.startswith(prefix) and not name.endswith(PARTIAL):
                    with suppress(DataError):  # deleted meanwhile
                        out[path] = self.stat(path)
        return dict(sorted(out.items()))

    def delete(self, path: str) -> None:
        target = self.root / path
        with output(target):
            target.unlink(missing_ok=True)
        for folder in target.parents:  # S3 knows no empty folders, so none are left here
            if folder == self.root or self.root not in folder.parents:
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def discard_partials(self, ours: re.Pattern[str]) -> None:
        for folder, _, names in os.walk(self.root):
            for partial in filter(None, map(_OWN_PARTIAL.fullmatch, names)):
                target = Path(folder) / partial[1]
                if ours.fullmatch(target.relative_to(self.root).as_posix()):
                    with output(target):
                        target.with_name(partial[0]).unlink(missing_ok=True)

    @staticmethod
    def _tag(stat: os.stat_result) -> str:
        return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"

    @contextmanager
    def _replacing(self, path: str) -> Iterator[Path]:
        target = self.root / path
        partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
        with output(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield partial
                with partial.open("rb") as file:
                    os.fsync(file.fileno())  # or a power cut could leave the new name with no content
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

    @staticmethod
    @contextmanager
    def _input(target: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise DataError(f"{target}: does not exist") from None
        except PermissionError:
            raise AccessError(f"{target}: may not be read by this user") from None
        except OSError as error:
            raise DataError(f"{target}: cannot be read ({error.strerror})") from None


def too_short(name: str, start: int, length: int, end: int) -> DataError:
    """The error for an object that ends before the bytes asked for."""
    return DataError(f"{name}: bytes {start} to {start + length} were asked for, it ends at {end}")


@contextmanager
def output(target: Path) -> Iterator[None]:
    """An OSError inside is an OutputError that names `target`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror})") from None
