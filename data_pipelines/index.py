"""Write the manifest of existing WebDataset shards: `python -m data_pipelines.index SHARDS_URL`.

Shards may come from other programs: png, jpg, webp or npy members, cls labels.
"""

from __future__ import annotations

import argparse
import os
from functools import partial

from data_pipelines.shards.indexed import index_stored, merge
from data_pipelines.shards.manifest import write_manifest
from data_pipelines.shards.process_pool import in_processes
from warm_dist.errors import run
from warm_dist.store.open import open_store


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.index", description=__doc__)
    parser.add_argument("shards_url", help="s3://bucket/prefix or a folder with .tar files")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a CPU)")
    args = parser.parse_args()
    from tqdm import tqdm

    store = open_store(args.shards_url, args.endpoint_url)
    names = [name for name in store.list() if name.endswith(".tar")]
    task = partial(index_stored, args.shards_url, args.endpoint_url)
    bar = tqdm(in_processes(task, names, args.workers), "index", len(names), unit="shard", disable=None)
    indexed = sorted(bar, key=lambda part: part.shard.name)
    manifest = write_manifest(store, merge(indexed))
    print(f"{manifest.info.num_images} images in {len(names)} shards, fingerprint {manifest.info.fingerprint}")
    return 0


if __name__ == "__main__":
    run(main)
