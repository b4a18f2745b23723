"""Write the manifest of existing WebDataset shards: `python -m data_pipelines.index SHARDS_URL`.

Shards may come from other programs: png, jpg, webp or npy members, cls labels. The class names of a manifest of the same
shards stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from data_pipelines.shards.indexed import Indexed, index_stored, merge
from data_pipelines.shards.manifest import NAME, read_manifest, write_manifest
from data_pipelines.shards.process_pool import in_processes
from warm_dist.cpus import usable_cpus
from warm_dist.errors import DataError, count, printable, run
from warm_dist.paths import place_argument
from warm_dist.store.base import Store
from warm_dist.store.open import open_store


def _kept(store: Store, indexed: Sequence[Indexed], endpoint_url: str | None) -> tuple[Sequence[str], str]:
    """Class names and attribution of the manifest that is there: shards do not hold them.

    Raises DataError if it has names for the classes of other shards.
    """
    try:
        manifest = read_manifest(f"{store.url}/{NAME}", endpoint_url)
    except DataError:  # none, or a damaged one, which this command mends
        return (), ""
    found = {part.shard for part in indexed}
    if found.issuperset(manifest.shards):
        largest = max((int(part.label.max()) for part in indexed if len(part.label)), default=-1)
        if not manifest.class_names or largest < len(manifest.class_names):
            return manifest.class_names, manifest.attribution
    elif manifest.class_names in ((), tuple(map(str, range(len(manifest.class_names))))):
        return (), ""
    raise DataError(
        f"{printable(store.url)}/{NAME}: its {len(manifest.class_names)} class names are of other shards than those there; "
        "move it away to number the classes"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.index", description=__doc__)
    parser.add_argument("shards_url", type=place_argument, help="s3://bucket/prefix or a folder with .tar files")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    parser.add_argument("--workers", type=int, default=usable_cpus(), help="processes (default: one a CPU)")
    args = parser.parse_args()
    from tqdm import tqdm

    store = open_store(args.shards_url, args.endpoint_url)
    names = [name for name in store.list() if name.endswith(".tar")]
    if not names:
        raise DataError(f"{printable(store.url)}: has no .tar shards; name the folder or prefix that holds them")
    task = partial(index_stored, args.shards_url, args.endpoint_url)
    bar = tqdm(in_processes(task, names, args.workers), "index", len(names), unit="shard", disable=None)
    indexed = sorted(bar, key=lambda part: part.shard.name)
    merged = merge(indexed, *_kept(store, indexed, args.endpoint_url))
    if flaw := merged.info.flaw():
        raise DataError(f"{printable(store.url)}: {flaw}")
    manifest = write_manifest(store, merged)
    images = f"{count(manifest.info.num_images, 'image')} in {count(len(names), 'shard')}"
    print(f"{images}, fingerprint {manifest.info.fingerprint}")
    return 0


if __name__ == "__main__":
    run(main)
