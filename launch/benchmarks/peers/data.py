"""Read one epoch as a peer's own documentation shows: `python launch/benchmarks/peers/data.py JOB.json`, started by launch/bench.py.

Standalone: it runs in the peers' environment and imports nothing of ours. Everybody gives uint8 batches in numpy, in one
process. The clocks start after the imports and a small warm-up set, and stop at the last image of the real one.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # (B, H, W, C)
Job = dict[str, Any]
PACKAGES = ("pillow", "numpy", "boto3", "webdataset", "awscli", "mosaicml-streaming")
MDS = {"npy": "ndarray:uint8:{0},{0},3", "png": "png", "jpg": "jpeg"}  # Streaming's encodings


class Clock:
    """Seconds since it was made, of this process and of its children that have ended."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._used()

    def wall(self) -> float:
        return time.perf_counter() - self._wall

    def cpu(self) -> float:
        return self._used() - self._cpu

    @staticmethod
    def _used() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def checksum(batches: Iterable[Images]) -> int:
    """One number for a set of images, whatever their order."""
    return sum(zlib.crc32(image.tobytes()) for images in batches for image in images)


def report(job: Job, images: int, wall_s: float, cpu_s: float, check: int | None) -> None:
    """Write the result where launch/bench.py looks for it."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    result = {"images": images, "wall_s": wall_s, "cpu_s": cpu_s, "checksum": check, "versions": versions}
    Path(job["out"]).write_text(json.dumps(result))


def webdataset_batches(job: Job, urls: list[str]) -> Iterator[Images]:
    """webdataset's README: decode("rgb8"), to_tuple, batched. Not shuffled."""
    import webdataset

    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    for (images,) in dataset.decode("rgb8").to_tuple(job["payload"]).batched(job["batch"]):
        yield images


def pipe_aws(job: Job, urls: list[str]) -> Iterator[Images]:
    """webdataset over the AWS command line, its documentation's way to S3."""
    command = f"pipe:{shlex.quote(job['aws'])} --endpoint-url {job['endpoint_url']} s3 cp"
    return webdataset_batches(job, [f"{command} {url} -" for url in urls])


def boto3_body(job: Job, urls: list[str]) -> Iterator[Images]:
    """webdataset over the body of a boto3 GET."""
    register_boto3(job)
    return webdataset_batches(job, urls)


def register_boto3(job: Job) -> None:
    import boto3
    from webdataset.gopen import gopen_schemes

    client = boto3.client("s3", endpoint_url=job["endpoint_url"])

    def open_url(url: str, mode: str = "rb", bufsize: int = 8192, **options: object) -> Any:
        bucket, key = url.removeprefix("s3://").split("/", 1)
        return client.get_object(Bucket=bucket, Key=key)["Body"]

    gopen_schemes["s3"] = open_url


def streaming(job: Job, urls: list[str]) -> Iterator[Images]:
    """MosaicML Streaming, without workers, from an empty local folder. Not shuffled."""
    from streaming import StreamingDataset  # type: ignore[import-not-found,unused-ignore]

    number = len(list(Path(job["folder"]).glob("local-*")))
    local = Path(job["folder"]) / f"local-{number}"
    dataset = StreamingDataset(remote=urls[0], local=str(local), shuffle=False, batch_size=job["batch"])
    batch = []
    for sample in dataset:
        batch.append(np.asarray(sample["image"]))
        if len(batch) == job["batch"]:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def write_mds(job: Job) -> None:
    """Our shards as Streaming's: the same pictures, to the byte, in shards of as many images."""
    import webdataset
    from streaming import MDSWriter  # type: ignore[import-not-found,unused-ignore]

    register_boto3(job)
    for part in job["sets"]:
        kind = part["payload"]
        columns = {"image": MDS[kind].format(job["resolution"])}
        with MDSWriter(out=part["mds"], columns=columns, size_limit=part["shard_bytes"]) as out:
            for sample in webdataset.WebDataset(part["urls"], shardshuffle=False, empty_check=False):
                payload = sample[kind]  # MDSWriter takes bytes for an image that is encoded already
                out.write({"image": np.load(io.BytesIO(payload)) if kind == "npy" else payload})


CONTENDERS: dict[str, Callable[[Job, list[str]], Iterator[Images]]] = {
    "pipe:aws": pipe_aws,
    "boto3": boto3_body,
    "streaming": streaming,
}


def main() -> None:
    job: Job = json.loads(Path(sys.argv[1]).read_text())
    if job["contender"] == "write":
        write_mds(job)
        return report(job, 0, 0.0, 0.0, None)
    batches = CONTENDERS[job["contender"]]
    for _ in batches(job, job["warm_urls"]):
        pass
    stream = batches(job, job["urls"])
    clock = Clock()
    images = sum(len(batch) for batch in stream)
    wall = clock.wall()
    del stream
    if job["contender"] == "pipe:aws":
        with suppress(ChildProcessError):  # a process counts once it has ended
            while True:
                os.wait()
    cpu = clock.cpu()
    check = checksum(batches(job, job["urls"])) if job["check"] else None
    return report(job, images, wall, cpu, check)


if __name__ == "__main__":
    main()
