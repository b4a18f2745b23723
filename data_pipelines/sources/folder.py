"""A folder of images as a source."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_pipelines.shards.manifest import NAME
from data_pipelines.shards.names import BAD, LISTING, PARTS, SHARD
from data_pipelines.sources.base import Source, check_size
from data_pipelines.sources.listing import File, Listing
from data_pipelines.sources.pictures import is_hidden
from data_pipelines.sources.transform import Transform
from data_pipelines.sources.tree import open_tree
from warm_dist.errors import AccessError, printable


def walk(root: Path, listing: Listing, output: Path | None) -> list[File]:
    """The regular files below a folder, links followed, each folder once. Raises AccessError for a folder it may not read.

    Packed data sets below it are left out; `root` itself may be one, unless it is the `output` of the packing.
    """
    files: list[File] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop()  # what is really there before what is linked
        try:
            status = os.stat(root / folder)
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise AccessError(f"{printable(f'{root / folder}')}: cannot be listed ({error.strerror})") from None
        if (status.st_dev, status.st_ino) in seen:
            listing.leave("links to folders that are listed already", folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        if not entries:
            listing.leave("empty folders", folder)
        ours = _ours({entry.name for entry in entries})
        if ours and not folder and not (output and _same(root, output)):
            ours = ours - _shards(ours)  # its shards are packed again
        for entry in entries:
            name = f"{folder}{entry.name}"
            if entry.name in ours:
                listing.leave("of a packed data set", name)
            elif is_hidden(entry.name):
                listing.leave("hidden or a system's own", name)
            elif _is(entry, os.DirEntry.is_dir):
                (links if entry.is_symlink() else folders).append(f"{name}/")
            elif _is(entry, os.DirEntry.is_file):
                files.append(File(name, entry.stat().st_size, name))
            else:
                listing.leave("broken links" if entry.is_symlink() else "no regular files", name)
    return sorted(files)


def open_folder(root: Path, files: list[File], listing: Listing, transform: Transform) -> Source:
    """The pictures among the files of a folder; class folders become labels."""
    return open_tree(listing, files, partial(_read, str(root)), transform)


def _read(root: str, name: str, size: int | None = None) -> bytes:
    with open(os.path.join(root, name), "rb") as file:
        if size is None:
            check_size(os.fstat(file.fileno()).st_size)
        return file.read(size)


def _ours(names: set[str]) -> set[str]:
    """The files of a packed data set, finished or not, among those of a folder."""
    shards = _shards(names)
    return shards | (names & {NAME, BAD, LISTING, PARTS}) if shards else set()


def _shards(names: set[str]) -> set[str]:
    return {name for name in names if SHARD.fullmatch(name)}


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _is(entry: os.DirEntry[str], kind: Callable[[os.DirEntry[str]], bool]) -> bool:
    try:
        return kind(entry)
    except OSError:  # a loop of links
        return False
