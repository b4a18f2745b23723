"""A store: objects under one URL, on S3 or in a folder, behind one interface."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from warm_dist.errors import DataError, OutputError

PIECE_BYTES = 32 << 20  # of a download
PARTIAL = ".partial"  # the name of a file until it is whole


class Stat(NamedTuple):
    """Size in bytes and the tag that changes whenever the object is replaced."""

    size: int
    etag: str


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
