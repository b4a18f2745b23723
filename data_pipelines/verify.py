"""Check every shard's sha256 and every image's crc32 and decoding: `python -m data_pipelines.verify MANIFEST_URL`.

Exits with code 3 and a list if anything is damaged.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.shards.manifest import Manifest, Shard, read_manifest
from data_pipelines.shards.payload import decode
from data_pipelines.shards.process_pool import in_processes, shared_store
from warm_dist.cpus import usable_cpus
from warm_dist.errors import DataError, count, printable, reason, run
from warm_dist.files import file_sha256
from warm_dist.paths import place_argument
from warm_dist.store.base import split_url


class _Task(NamedTuple):
    """One shard. rows: (name, offset, length, crc32) of its images."""

    url: str
    endpoint_url: str | None
    shard: Shard
    rows: Sequence[tuple[str, int, int, int]]
    shape: tuple[int, int, int]


def verify(manifest: Manifest, url: str, endpoint_url: str | None = None, workers: int = 1) -> Iterator[list[str]]:
    """Check the shards below `url`; yields a list of damages for each, in order of completion. Reads everything."""
    size, channels = manifest.info.resolution, manifest.info.channels
    borders = np.searchsorted(manifest.shard, np.arange(len(manifest.shards) + 1)).tolist()

    def tasks() -> Iterable[_Task]:
        for shard, start, stop in zip(manifest.shards, borders, borders[1:], strict=False):
            names = [manifest.name(row) for row in range(start, stop)]
            columns = (getattr(manifest, name)[start:stop].tolist() for name in ("offset", "length", "crc32"))
            rows = list(zip(names, *columns, strict=True))
            yield _Task(url, endpoint_url, shard, rows, (size, size, channels))

    yield from in_processes(_damages, tasks(), workers)


def _damages(task: _Task) -> list[str]:
    name = task.shard.name
    damages = []
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.tar"
        try:
            shared_store(task.url, task.endpoint_url).download(name, local)
        except DataError as error:
            return [str(error)]
        if file_sha256(local) != task.shard.sha256:
            damages.append(f"shard {name}: sha256 differs from the manifest's")
        with local.open("rb") as file:
            for image, offset, length, crc in task.rows:
                file.seek(offset)
                payload = file.read(length)
                if zlib.crc32(payload) != crc:
                    damages.append(f"{image}: crc32 differs from the manifest's")
                    continue
                try:
                    decode(payload, task.shape)
                except (ValueError, OSError) as error:
                    damages.append(f"{image}: does not decode ({reason(error)})")
    return damages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.verify", description=__doc__)
    parser.add_argument("manifest_url", type=place_argument, help="s3://bucket/prefix/manifest.parquet or a path")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    parser.add_argument("--workers", type=int, default=usable_cpus(), help="processes (default: one a CPU)")
    args = parser.parse_args()
    from tqdm import tqdm

    manifest = read_manifest(args.manifest_url, args.endpoint_url)
    done = verify(manifest, split_url(args.manifest_url)[0], args.endpoint_url, args.workers)
    bar = tqdm(done, desc="verify", total=len(manifest.shards), unit="shard", disable=None)
    damages = [damage for found in bar for damage in found]
    if damages:
        raise DataError(
            f"{args.manifest_url}: {count(len(damages), 'damage')}\n  " + "\n  ".join(map(printable, damages))
        )
    images, shards = count(manifest.info.num_images, "image"), count(len(manifest.shards), "shard")
    print(f"{images} in {shards} {'is' if manifest.info.num_images == 1 else 'are'} as packed")
    return 0


if __name__ == "__main__":
    run(main)
