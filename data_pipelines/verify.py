"""Audit a data set: every shard's sha256, every image's crc32 and decoding.

`python -m data_pipelines.verify MANIFEST_URL`; exit code 3 and a list if anything is damaged.
"""

from __future__ import annotations

import argparse
import hashlib
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from data_pipelines.manifest import Manifest, read_manifest
from data_pipelines.payload import decode
from data_pipelines.store import Store, open_store, split_url
from warm_dist.errors import DataError, run


def verify(manifest: Manifest, store: Store, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> list[str]:
    """One line for each damage found; empty if all is well. Reads everything, one shard at a time."""
    size, channels = manifest.info.resolution, manifest.info.channels
    damages = []
    for number, shard in enumerate(progress(manifest.shards)):
        try:
            data = store.read(shard.name)
        except DataError as error:
            damages.append(str(error))
            continue
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            damages.append(f"shard {shard.name}: sha256 differs from the manifest's")
        for row in np.flatnonzero(manifest.shard == number).tolist():
            start, length = int(manifest.offset[row]), int(manifest.length[row])
            payload = data[start : start + length]
            if zlib.crc32(payload) != manifest.crc32[row]:
                damages.append(f"{manifest.name(row)}: crc32 differs from the manifest's")
                continue
            try:
                decode(payload, (size, size, channels))
            except (ValueError, OSError) as error:
                damages.append(f"{manifest.name(row)}: does not decode ({error})")
    return damages


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.verify", description=__doc__)
    parser.add_argument("manifest_url", help="s3://bucket/prefix/manifest.parquet or a path")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    args = parser.parse_args()
    from tqdm import tqdm

    manifest = read_manifest(args.manifest_url, args.endpoint_url)
    store = open_store(split_url(args.manifest_url)[0], args.endpoint_url)
    damages = verify(manifest, store, lambda shards: tqdm(shards, desc="verify", unit="shard", disable=None))
    if damages:
        raise DataError(f"{args.manifest_url}: {len(damages)} damages\n  " + "\n  ".join(damages))
    print(f"{manifest.info.num_images} images in {len(manifest.shards)} shards are as packed")
    return 0


if __name__ == "__main__":
    run(main)
