"""Indexes shards and merges their indexes into a manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.shards.manifest import Manifest, Shard
from data_pipelines.shards.payload import decode
from data_pipelines.shards.process_pool import shared_store
from data_pipelines.shards.statistics import BATCH_BYTES, Statistics
from data_pipelines.shards.tars import samples
from warm_dist.errors import DataError, reason
from warm_dist.files import file_sha256


@dataclass(frozen=True)
class Indexed:
    """A shard's part of the manifest. shape: (H, W, C) of its images, () without images. Arrays: one row per image."""

    shard: Shard
    shape: tuple[int, ...]
    payloads: tuple[str, ...]
    keys: tuple[str, ...]
    label: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    measure: Statistics


def index_shard(file: Path, name: str) -> Indexed:
    """Index a tar, decoding every image. Raises DataError if it is damaged or its images differ in shape."""
    entries = samples(file, name)
    measure, images, shape = Statistics(), [], None
    with file.open("rb") as stream:
        for entry in entries:
            stream.seek(entry.offset)
            try:
                image = decode(stream.read(entry.length), shape)
            except (ValueError, OSError) as error:
                raise DataError(f"image {entry.key!r} in shard {name}: does not decode ({reason(error)})") from None
            shape = image.shape
            if shape[0] != shape[1]:
                advice = "images must be square; use data_pipelines.pack"
                raise DataError(f"image {entry.key!r} in shard {name}: has shape {shape}, {advice}")
            images.append(image)
            if len(images) * image.size >= BATCH_BYTES:
                measure.add(images)
                images = []
    measure.add(images)
    return Indexed(
        Shard(name, file.stat().st_size, len(entries), file_sha256(file)),
        shape or (),
        tuple(sorted({entry.payload for entry in entries})),
        tuple(entry.key for entry in entries),
        np.array([entry.label for entry in entries], np.int64),
        np.array([entry.offset for entry in entries], np.int64),
        np.array([entry.length for entry in entries], np.int64),
        np.array([entry.crc32 for entry in entries], np.uint32),
        measure,
    )


def merge(shards: Iterable[Indexed], class_names: Sequence[str] = (), attribution: str = "") -> Manifest:
    """The manifest of these shards in this order, without its fingerprint.

    class_names: if empty, numbers if there are labels. Raises DataError without images, for different shapes, or for
    repeated keys.
    """
    parts, measure, first, seen = [], Statistics(), None, set[str]()
    for part in shards:
        parts.append(replace(part, measure=Statistics()))  # sums may be megabytes each, for thousands of shards
        if not part.keys:
            continue
        first = first or part
        if part.shape != first.shape:
            other = f"{first.shape} as in {first.shard.name}"
            raise DataError(f"shard {part.shard.name}: has images of shape {part.shape}, needs {other}")
        before = len(seen)
        seen.update(part.keys)
        if len(seen) < before + len(part.keys):
            raise DataError(f"shard {part.shard.name}: a key occurs twice, in it or in the shards before it")
        measure.merge(part.measure)
    if first is None:
        raise DataError("no images")
    label = np.concatenate([part.label for part in parts])
    if not class_names and label.max() >= 0:
        class_names = [str(number) for number in range(label.max() + 1)]
    payloads = {payload for part in parts for payload in part.payloads}
    return Manifest(
        info=measure.info(len(class_names)),
        shards=tuple(part.shard for part in parts),
        shard=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.keys) for part in parts]),
        key=np.array([key for part in parts for key in part.keys], object),
        label=label,
        offset=np.concatenate([part.offset for part in parts]),
        length=np.concatenate([part.length for part in parts]),
        crc32=np.concatenate([part.crc32 for part in parts]),
        payload=payloads.pop() if len(payloads) == 1 else "mixed",
        class_names=tuple(class_names),
        attribution=attribution,
    )


def index_stored(url: str, endpoint_url: str | None, name: str) -> Indexed:
    """Download and index the shard `name` below `url`. Raises as `index_shard`, and what the store raises."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.tar"
        shared_store(url, endpoint_url).download(name, local)
        return index_shard(local, name)
