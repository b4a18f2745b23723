"""Zip and tar archives as sources, without extracting them: trees of images, or WebDataset shards."""

from __future__ import annotations

import lzma
import os
import stat
import zipfile
import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

from data_pipelines.shards.tars import members
from data_pipelines.sources.base import Source, check_size
from data_pipelines.sources.listing import File, Listing
from data_pipelines.sources.pictures import plain
from data_pipelines.sources.transform import Transform
from data_pipelines.sources.tree import open_tree
from warm_dist.errors import DataError, printable, reason

# what reading a member raises if it is damaged, encrypted or of an unknown method
_DAMAGE = (KeyError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError)


@lru_cache(maxsize=64)
def opened(path: str, modified_ns: int) -> BinaryIO:
    """An open file, cached per process and version, because a part reads a thousand ranges of it."""
    return open(path, "rb")


@lru_cache(maxsize=4)
def _opened_zip(path: str, modified_ns: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _read_member(path: str, name: str, size: int | None = None) -> bytes:
    try:
        archive = _opened_zip(path, os.stat(path).st_mtime_ns)
        if size is None:
            check_size(archive.getinfo(name).file_size)
        with archive.open(name) as file:
            return file.read() if size is None else file.read(size)
    except _DAMAGE as error:
        raise ValueError(f"{type(error).__name__}: {reason(error)}") from None


def open_zip(path: Path, listing: Listing, transform: Transform) -> Source:
    """A zip archive of images. Raises DataError if it is not readable as one."""
    files = []
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = plain(info.filename)
                if stat.S_ISLNK(info.external_attr >> 16):
                    listing.leave("links and devices", name)
                elif name and not info.filename.endswith(("/", "\\")):  # is_dir fails for ""
                    files.append(File(name, info.file_size ^ info.CRC << 64, info.filename))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{listing.where}: not a readable zip archive ({reason(error)})") from None
    return open_tree(listing, files, partial(_read_member, str(path)), transform)


def _read_place(place: tuple[str, int, int], size: int | None = None) -> bytes:
    path, offset, whole = place
    if size is None:
        check_size(whole)
    file = opened(path, os.stat(path).st_mtime_ns)
    file.seek(offset)
    return file.read(whole if size is None else min(size, whole))


def open_tars(paths: list[Path], listing: Listing, transform: Transform) -> Source:
    """Uncompressed tars; labels come from cls members, else from folders. Raises DataError for a damaged tar."""
    left = partial(listing.leave, "links and devices")
    files = [
        File(plain(member.name), member.size, (str(path), member.offset, member.size))
        for path in paths
        for member in members(path, printable(str(path)), left)
    ]
    return open_tree(listing, files, _read_place, transform)
