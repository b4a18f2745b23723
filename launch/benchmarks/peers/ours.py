"""Read one epoch with our own loader: `python launch/benchmarks/peers/ours.py JOB.json`, started by launch/bench.py.

The loader never ends and reads ahead, across epochs too. So a whole epoch is the warm-up, and the clocks run from the
first batch of the second epoch to the first of the third: as much is ready at the one as at the other.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path

from data_pipelines.reading.loader import Loader
from data_pipelines.shards.manifest import read_manifest
from launch.benchmarks.peers.data import Clock, checksum, report
from warm_dist.config.run import DataConfig
from warm_dist.store.base import split_url
from warm_dist.store.open import open_store

LANES = 8  # a rank of 16 has so many of the 128 in configs/ffhq64.json; a window of each fits into the buffer


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    url, endpoint, size = job["manifest"], job["endpoint_url"], job["resolution"]
    data = DataConfig(manifest=url, endpoint_url=endpoint, resolution=size, num_lanes=LANES)
    loader = Loader(
        read_manifest(url, endpoint),
        open_store(split_url(url)[0], endpoint),
        batch_size=job["batch"],
        num_lanes=data.num_lanes,
        seed=0,
        rank=0,
        world=1,
        chunk=data.chunk,
        window=data.window,
        threads=data.reader_threads,
        buffer_bytes=data.buffer_bytes,
    )
    with closing(loader), closing(loader.batches(0)) as batches:  # type: ignore[type-var]
        epoch = job["images"] // job["batch"]
        warm = (batch.images.transpose(0, 2, 3, 1) for batch in islice(batches, epoch))
        check = checksum(warm) if job["check"] else sum(0 for _ in warm)
        next(batches)
        clock = Clock()
        images = sum(len(batch.images) for batch in islice(batches, epoch))
        wall, cpu = clock.wall(), clock.cpu()
    report(job, images, wall, cpu, check if job["check"] else None)


if __name__ == "__main__":
    main()
