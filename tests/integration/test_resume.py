"""Each image once an epoch, in one order, whatever reads it: any world, any threads, killed and resumed, and at once."""

from __future__ import annotations

import os
import random
import signal
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines.pack import pack
from data_pipelines.reading import loader as loader_module
from data_pipelines.reading.lanes import Order, rank_positions
from data_pipelines.reading.loader import Loader, open_loader
from data_pipelines.shards.manifest import NAME, Manifest, Shard, write_manifest
from data_pipelines.shards.payload import encode
from data_pipelines.sources.open import open_source
from tests.support.processes import ROOT
from tests.support.reader import OPTIONS
from tests.support.zygote import zygote
from warm_dist.config.run import load_config
from warm_dist.data import LOW_MODES, Batch, DataInfo
from warm_dist.store.base import Stat, Store
from warm_dist.store.folder import FolderStore
from warm_dist.store.s3 import S3Store
from warm_dist.store.seaweedfs import S3Server

if TYPE_CHECKING:
    from tests.support.packed import Packed

N = 1797


class Data:
    """All digits in a folder, and what must come at each position: computed here from the order, without the loader."""

    def __init__(self, folder: Path) -> None:
        self.store = FolderStore(folder)
        self.manifest = pack(open_source("digits", 8), str(folder), shard_size=500)
        order = Order([shard.num_images for shard in self.manifest.shards], 3, 8, 16, 64)
        self.rows = order.row_of(np.arange(5 * N))
        self.images = np.stack([item.image for item in open_source("digits", 8)]).transpose(0, 3, 1, 2)

    def loader(self, **changes: int) -> Loader:
        return Loader(self.manifest, self.store, **{**OPTIONS, "rank": 0, "world": 1, "threads": 1, **changes})

    def assert_right(self, batch: Batch, positions: np.ndarray) -> None:
        rows = self.rows[positions]
        assert np.array_equal(batch.positions, positions)
        assert batch.keys == tuple(self.manifest.key[rows])
        assert np.array_equal(batch.labels, self.manifest.label[rows])
        assert np.array_equal(batch.images, self.images[rows])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("digits"))


class Ranks:
    """Real processes, one a rank, that print what they read."""

    def __init__(self, packed: Packed, world: int, threads: int, nimg: int) -> None:
        self.nimg, self.world = nimg, world
        command = ["-m", "tests.support.reader", packed.manifest_url, packed.endpoint_url]
        self.processes, self.pipes = [], []
        for rank in range(world):
            ours, theirs = os.pipe()
            words = map(str, (rank, world, threads, nimg))
            self.processes.append(zygote().start(*command, *words, stdout=theirs))
            os.close(theirs)
            self.pipes.append(os.fdopen(ours))
        self.lines: list[list[str]] = [[] for _ in range(world)]

    def read(self, count: int) -> None:
        """So many batches of each rank; they read on meanwhile, until their pipes are full."""
        for pipe, lines in zip(self.pipes, self.lines, strict=True):
            lines += islice(pipe, count)
            assert len(lines) == count

    def kill(self) -> list[str]:
        """SIGKILL to all; `key:crc32` by position, as far as every rank came."""
        for process in self.processes:
            process.kill()
        for process, pipe, lines in zip(self.processes, self.pipes, self.lines, strict=True):
            lines += [line for line in pipe if line[-1] == "\n"]
            pipe.close()
            assert process.wait() == -signal.SIGKILL
            process.communicate()
        out: list[str] = []
        for number, parts in enumerate(zip(*self.lines, strict=False)):
            nimg = self.nimg + 32 * number
            found: dict[int, str] = {}
            for rank, line in enumerate(parts):
                first, *images = line.split()
                assert int(first) == nimg
                found |= zip(rank_positions(nimg, 32, 8, rank, self.world).tolist(), images, strict=True)
            out += [found[position] for position in range(nimg, nimg + 32)]
        return out


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 6))])
def test_kill_9_and_resume_with_other_ranks_and_threads(digits: Packed, data: Data, seed: int) -> None:
    """Three runs one after another, each killed in the middle of something, each of another shape.

    Fault: an order of images that depends on the ranks, the threads or where the run resumed.
    """
    draw, seen = random.Random(seed), []
    shapes = [(4, 1), (2, 4), (1, 2)] if seed % 2 else [(2, 2), (1, 4), (4, 1)]
    for world, threads in shapes:
        ranks = Ranks(digits, world, threads, len(seen))
        try:
            ranks.read(draw.randrange(5, 90))
        finally:
            seen += ranks.kill()
        # a checkpoint was somewhat earlier than the kill
        del seen[max(0, len(seen) - 32 * draw.randrange(4)) :]
        assert len(seen) % 32 == 0
    last = Ranks(digits, 2, 1, len(seen))
    try:
        last.read(max(1, -(-(3 * N - len(seen)) // 32)))
    finally:
        seen += last.kill()
    assert len(seen) >= 3 * N
    rows = Order([s.num_images for s in digits.manifest.shards], 3, 8, 16, 64).row_of(np.arange(len(seen)))
    pixels = [f"{zlib.crc32(np.ascontiguousarray(image)):08x}" for image in data.images]
    assert seen == [f"{digits.manifest.key[row]}:{pixels[row]}" for row in rows]
    for epoch in range(3):
        assert len({entry.split(":")[0] for entry in seen[epoch * N : (epoch + 1) * N]}) == N


SHARDS, PER_SHARD = 1270, 1009  # 1,281,430 images, ImageNet's number
PAYLOAD = encode(np.full((64, 64, 3), 7, np.uint8), "npy")
RECORD = 512 + -(-len(PAYLOAD) // 512) * 512
SHARD_BYTES = PER_SHARD * RECORD + 1024
MOST_BYTES = RECORD + loader_module._GAP_BYTES  # read for one image, with the gap before it


def simulated(store: Store) -> Manifest:
    """ImageNet's manifest, with keys as long as its file names; every image has the same pixels."""
    n, modes = SHARDS * PER_SHARD, 3 * LOW_MODES**2
    spectrum = np.full((64, 64), 0.25)
    info = DataInfo(
        64, 3, 1000, n, np.zeros(3), np.zeros((3, 64, 64)), spectrum, 0.5, np.zeros(modes), np.eye(modes), ""
    )
    numbers = np.random.default_rng(0).integers(0, 100_000, n)
    manifest = Manifest(
        info=info,
        shards=tuple(Shard(f"{shard:06d}.tar", SHARD_BYTES, PER_SHARD, "0" * 64) for shard in range(SHARDS)),
        shard=np.repeat(np.arange(SHARDS, dtype=np.int32), PER_SHARD),
        key=np.array([f"{row:08d}-n{row % 1000:08d}_{number}" for row, number in enumerate(numbers)], object),
        label=np.arange(n) % 1000,
        offset=np.tile(512 + RECORD * np.arange(PER_SHARD), SHARDS),
        length=np.full(n, len(PAYLOAD)),
        crc32=np.full(n, zlib.crc32(PAYLOAD), np.uint32),
        payload="npy",
        class_names=tuple(f"class {label}" for label in range(1000)),
        attribution="",
    )
    return write_manifest(store, manifest)


class Simulated(S3Store):
    """1,270 objects of one byte stand for the shards: lists are real, sizes and pixels are not."""

    shard = (bytes(512) + PAYLOAD + bytes(RECORD - 512 - len(PAYLOAD))) * PER_SHARD + bytes(1024)
    lock, bytes_read = Lock(), 0

    def list(self, prefix: str = "") -> dict[str, Stat]:
        found = super().list(prefix)
        return {name: Stat(SHARD_BYTES, stat.etag) if name.endswith(".tar") else stat for name, stat in found.items()}

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        if not path.endswith(".tar"):
            return super().read(path, start, length, etag)
        assert length is not None
        with self.lock:
            self.bytes_read += length
        return self.shard[start : start + length]


def test_a_run_on_imagenet_resumes_by_a_seek(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """From open_loader at a random nimg of another world size to the first batch: reads one manifest and what comes next.

    Fault: reading or ordering anything that precedes the first batch. It takes 0.9 s of a processor.
    """
    store = Simulated("warm-dist", "simulated", s3.endpoint_url)
    manifest = simulated(store)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shard: store.write(shard.name, b"0"), manifest.shards))
    config = load_config(
        str(ROOT / "configs" / "imagenet64.json"),
        [f"data.manifest=s3://warm-dist/simulated/{NAME}", f"data.endpoint_url={s3.endpoint_url}"],
    )
    draw = random.Random(0)
    order = Order([PER_SHARD] * SHARDS, config.train.seed, 256, config.data.chunk, config.data.window)
    epochs: list[int] = []

    class Watched(Order):
        def _make(self, epoch: int) -> NDArray[np.int64]:
            epochs.append(epoch)
            return super()._make(epoch)

    monkeypatch.setattr(loader_module, "Order", Watched)
    for world in (64, 16, 32):
        rank, nimg = draw.randrange(world), 4096 * draw.randrange(100_000)
        opened = Simulated("warm-dist", "simulated", s3.endpoint_url)
        monkeypatch.setattr(loader_module, "open_store", lambda url, endpoint, opened=opened: opened)
        with closing(open_loader(config, rank, world)) as reader:
            batch = next(reader.batches(nimg))
        first = nimg // order.num_images
        assert epochs in ([first], [first, first + 1])
        assert first > 0
        epochs.clear()
        assert opened.bytes_read <= 5 * 4096 // world * MOST_BYTES  # the first batch, and four ahead of it
        rows = order.row_of(rank_positions(nimg, 4096, 256, rank, world))
        assert batch.keys == tuple(manifest.key[rows])
        assert (batch.images == 7).all()
