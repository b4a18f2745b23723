"""Zip and tar archives as sources, without extracting them: trees of images, or WebDataset shards."""

from __future__ import annotations

import os
import zipfile
import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

from data_pipelines.shards.tars import members, read_label
from data_pipelines.sources.base import Record, Source, check_size, is_picture, listed, listed_tree
from data_pipelines.sources.transform import Transform
from warm_dist.errors import DataError


@lru_cache(maxsize=64)
def opened(path: str, modified_ns: int) -> BinaryIO:
    """An open file, cached per process and version, because a part reads a thousand ranges of it."""
    return open(path, "rb")


@lru_cache(maxsize=4)
def _opened_zip(path: str, modified_ns: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _read_member(path: str, name: str) -> bytes:
    try:
        archive = _opened_zip(path, os.stat(path).st_mtime_ns)
        check_size(name, archive.getinfo(name).file_size)
        return archive.read(name)
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None  # damaged, encrypted, or of an unknown method


def open_zip(path: Path, transform: Transform) -> Source:
    """A zip archive of images. Raises DataError if it is not readable as one."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [info for info in archive.infolist() if not info.filename.endswith("/")]  # is_dir fails for ""
            files = {info.filename: (info.file_size, info.CRC) for info in entries}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: not a readable zip archive ({error})") from None
    sizes = [(name, size ^ crc << 64) for name, (size, crc) in files.items()]
    return listed_tree(sizes, lambda name: name, partial(_read_member, str(path)), transform, str(path))


def _read_place(place: tuple[str, int, int]) -> bytes:
    path, offset, size = place
    check_size(path, size)
    file = opened(path, os.stat(path).st_mtime_ns)
    file.seek(offset)
    return file.read(size)


def open_tars(paths: list[Path], transform: Transform) -> Source:
    """Uncompressed tars; labels come from cls members, else from folders. Raises DataError for a damaged tar."""
    places: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    for path in paths:
        for member in members(path, str(path)):
            place = (str(path), member.offset, member.size)
            stem, _, suffix = member.name.rpartition(".")
            if suffix == "cls":
                labels[stem] = read_label(_read_place(place), f"{path}: {member.name!r}")
            elif is_picture(member.name):
                if member.name in places:
                    raise DataError(f"{path}: the picture {member.name[:80]!r} occurs twice")
                places[member.name] = place
    sizes = {name: place[2] for name, place in places.items()}
    if not labels:
        return listed_tree(sizes.items(), places.__getitem__, _read_place, transform, str(paths[0]))
    bare = next((name for name in places if name.rpartition(".")[0] not in labels), None)
    if bare is not None:
        raise DataError(f"{places[bare][0]}: {bare!r} has no cls member, others have")
    records = [Record(name, labels[name.rpartition(".")[0]], place) for name, place in places.items()]
    names = [str(number) for number in range(max(record.label for record in records) + 1)]
    return listed(records, _read_place, transform, names, str(paths[0]), sizes.values())
