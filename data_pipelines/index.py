"""WebDataset shards → manifest: a walk over the tars, and the data's statistics. Also for shards that others wrote.

`python -m data_pipelines.index SHARDS_URL` gives existing shards (png, jpg, webp, npy members; cls labels) a manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.manifest import Manifest, Shard, write_manifest
from data_pipelines.measure import BATCH_BYTES, Measure
from data_pipelines.payload import decode
from data_pipelines.tars import samples
from data_pipelines.workers import in_processes, shared_store
from warm_dist.errors import DataError, run
from warm_dist.store.open import open_store


@dataclass(frozen=True)
class Indexed:
    """One shard as the manifest will have it. shape: (H, W, C) of its images, () without any. Rows in their order."""

    shard: Shard
    shape: tuple[int, ...]
    payloads: tuple[str, ...]
    keys: tuple[str, ...]
    label: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    measure: Measure


def index_shard(file: Path, name: str) -> Indexed:
    """Index one tar and decode all of it. Raises DataError if it is damaged or its images differ in shape."""
    entries = samples(file, name)
    measure, images, shape = Measure(), [], None
    with file.open("rb") as stream:
        for entry in entries:
            stream.seek(entry.offset)
            try:
                image = decode(stream.read(entry.length), shape)
            except (ValueError, OSError) as error:
                raise DataError(f"image {entry.key!r} in shard {name}: does not decode ({error})") from None
            shape = image.shape
            if shape[0] != shape[1]:
                raise DataError(
                    f"image {entry.key!r} in shard {name}: has shape {shape}, images must be square; "
                    "use data_pipelines.pack"
                )
            images.append(image)
            if len(images) * image.size >= BATCH_BYTES:
                measure.add(images)
                images = []
    measure.add(images)
    return Indexed(
        Shard(name, file.stat().st_size, len(entries), sha256(file)),
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
    """The manifest of these shards, in this order. class_names: empty means numbers, or no classes without labels.

    Raises DataError if there are no images, shapes differ, or keys repeat.
    """
    parts, measure, first, seen = [], Measure(), None, set[str]()
    for part in shards:
        parts.append(replace(part, measure=Measure()))  # its sums may be megabytes, and there may be thousands
        if not part.keys:
            continue
        first = first or part
        if part.shape != first.shape:
            raise DataError(
                f"shard {part.shard.name}: has images of shape {part.shape}, where {first.shape} is needed as in "
                f"{first.shard.name}"
            )
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


def sha256(file: Path) -> str:
    """Of a file of any size."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _index_stored(url: str, endpoint_url: str | None, name: str) -> Indexed:
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.tar"
        shared_store(url, endpoint_url).download(name, local)
        return index_shard(local, name)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.index", description=__doc__)
    parser.add_argument("shards_url", help="s3://bucket/prefix or a folder with .tar files")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a CPU)")
    args = parser.parse_args()
    from tqdm import tqdm

    store = open_store(args.shards_url, args.endpoint_url)
    names = [name for name in store.list() if name.endswith(".tar")]
    task = partial(_index_stored, args.shards_url, args.endpoint_url)
    done = in_processes(task, names, args.workers)
    indexed = sorted(
        tqdm(done, desc="index", total=len(names), unit="shard", disable=None), key=lambda part: part.shard.name
    )
    manifest = write_manifest(store, merge(indexed))
    print(f"{manifest.info.num_images} images in {len(names)} shards, fingerprint {manifest.info.fingerprint}")
    return 0


if __name__ == "__main__":
    run(main)
