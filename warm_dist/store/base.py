"""A store: objects under one URL, on S3 or in a folder, behind one interface."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from warm_dist.errors import DataError, writing
from warm_dist.paths import place

PIECE_BYTES = 32 << 20  # per read of a download
PARTIAL = ".partial"  # suffix of a file until it is complete


class Stat(NamedTuple):
    """An object's size in bytes, and a tag that changes whenever it is replaced."""

    size: int
    etag: str


def split_url(url: str) -> tuple[str, str]:
    """Split off the last name: `s3://bucket/a/manifest.parquet` → (`s3://bucket/a`, `manifest.parquet`)."""
    with suppress(ValueError):  # for `open_store` to tell
        url = place(url)
    folder, separator, name = url.rpartition("/")
    return (folder or "/", name) if separator else (".", name)


class Store(ABC):
    """Objects under one URL, safe to share between threads. Paths are relative to it, with forward slashes."""

    url: str

    @abstractmethod
    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        """Read `length` bytes from `start` (None: to the end).

        etag: the only acceptable version. Raises DataError if the object is missing, replaced or too short.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Create or replace an object atomically: readers see the old one or the new one, never a part."""

    @abstractmethod
    def write_if(self, path: str, data: bytes, etag: str | None) -> str | None:
        """Create an object (etag None), or replace its version `etag`; returns the new tag, None if another is there."""

    @abstractmethod
    def upload(self, path: str, local_file: Path) -> None:
        """Like `write`, from a file that need not fit into memory."""

    @abstractmethod
    def stat(self, path: str) -> Stat:
        """An object's size and tag. Raises DataError if it does not exist."""

    @abstractmethod
    def list(self, prefix: str = "") -> dict[str, Stat]:
        """All objects whose paths start with `prefix`, sorted by path."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete an object, if it exists."""

    @abstractmethod
    def discard_partials(self, ours: re.Pattern[str]) -> None:
        """Remove incomplete writes of objects whose whole path matches `ours`, of killed writers and of living ones."""

    def forget(self, path: str, start: int, length: int, etag: str) -> bool:
        """Drop cached copies of bytes that proved wrong, so that they are fetched again; True if there were any."""
        return False

    def held_bytes(self, length: int) -> int:
        """Most memory that a `read` of `length` bytes takes, its result included."""
        return length

    def download(self, path: str, local_file: Path) -> None:
        """Copy an object of any size to a local file, piece by piece, all from one version."""
        size, etag = self.stat(path)
        with writing(local_file), local_file.open("wb") as out:
            try:
                for start in range(0, size, PIECE_BYTES):
                    out.write(self.read(path, start, min(PIECE_BYTES, size - start), etag))
            except BaseException:
                local_file.unlink(missing_ok=True)
                raise


def too_short(name: str, start: int, length: int, end: int) -> DataError:
    """The error for an object that ends before the requested bytes."""
    return DataError(f"{name}: bytes {start} to {start + length} were asked for, it ends at {end}")
