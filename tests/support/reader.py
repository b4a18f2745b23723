"""One rank that reads for ever, for tests that kill it: a line a batch, flushed, `nimg key:crc32-of-pixels …`.

python -m tests.support.reader MANIFEST_URL ENDPOINT RANK WORLD THREADS NIMG
"""

from __future__ import annotations

import sys
import zlib
from contextlib import closing

from data_pipelines.reading.loader import Loader
from data_pipelines.shards.manifest import read_manifest
from warm_dist.store.base import split_url
from warm_dist.store.open import open_store

OPTIONS = {"batch_size": 32, "num_lanes": 8, "seed": 3, "chunk": 16, "window": 64, "buffer_bytes": 1 << 20}


def main() -> None:
    url, endpoint = sys.argv[1], sys.argv[2] or None
    rank, world, threads, nimg = map(int, sys.argv[3:])
    store = open_store(split_url(url)[0], endpoint)
    reader = Loader(read_manifest(url, endpoint), store, rank=rank, world=world, threads=threads, **OPTIONS)
    with closing(reader):
        for batch in reader.batches(nimg):
            images = zip(batch.keys, batch.images, strict=True)
            print(nimg, *(f"{key}:{zlib.crc32(image):08x}" for key, image in images), flush=True)
            nimg += OPTIONS["batch_size"]


if __name__ == "__main__":
    main()
