"""A tree of files as a source, in a folder, a zip or tars alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from data_pipelines.sources.base import Record, Source, listed
from data_pipelines.sources.classes import EDM, Sidecars, labelled
from data_pipelines.sources.listing import File, Listing
from data_pipelines.sources.pictures import HEAD_BYTES, suffix_of
from data_pipelines.sources.transform import Transform
from warm_dist.errors import count


class Reader(Protocol):
    """Reads a file's first `size` bytes (None: all) from its place; picklable, for packing in several processes."""

    def __call__(self, place: Any, size: int | None = None) -> bytes: ...


def open_tree(listing: Listing, files: Iterable[File], read: Reader, transform: Transform) -> Source:
    """The pictures among the files that a listing wants. Raises ConfigError for two plausible readings, DataError for none."""

    def head(place: Any) -> bytes:
        try:
            return read(place, HEAD_BYTES)
        except (ValueError, OSError):
            return b""

    wanted = listing.wanted(files)
    edm = [file for file in wanted if file.name.rpartition("/")[2] == EDM]
    cls = [file for file in wanted if suffix_of(file.name) == ".cls"]
    kept = {file.name for file in (*edm, *cls)}
    pictures = listing.pictures((file for file in wanted if file.name not in kept), head)
    if not pictures:
        raise listing.empty()
    splits = listing.of_split(pictures)
    listing.without_masks([split.file for split in splits])
    labels, class_names = labelled(listing, splits, Sidecars(edm, cls, read))
    records = [Record(file.name, label, file.place) for file, label in labels]
    listing.notes.insert(0, f"images: {count(len(records), 'picture')} of {listing.where}")
    identity = [file.content for file, _ in labels]
    return listed(records, read, transform, class_names, listing.where, identity, listing.told())
