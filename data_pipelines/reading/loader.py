"""Batches from any position on: ranged GETs by threads, ordered, bounded in bytes, every image checked by its crc32.

Work is cut into blocks of consecutive batches. The rows of a block are sorted by place, neighbours are merged into one
GET, and while one block is consumed the next is fetched. What is in a batch depends on none of this.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from data_pipelines.reading.lanes import Order, rank_positions
from data_pipelines.shards.manifest import Manifest, read_manifest
from data_pipelines.shards.payload import decode
from warm_dist.config.batch import check_lanes
from warm_dist.config.run import Config
from warm_dist.data import Batch, DataInfo
from warm_dist.errors import ConfigError, DataError
from warm_dist.store.base import Store, split_url
from warm_dist.store.cache import CachedStore
from warm_dist.store.open import open_store

_RAMP = 4  # blocks grow by this factor, so that the first batch waits for little
# A request costs about as long as this many bytes take, so smaller gaps are read and thrown away.
# Derived: 3 ms a request (measured, SeaweedFS on loopback) at 20 MB/s for each thread.
_GAP_BYTES = 64 << 10
_GET_BYTES = 8 << 20  # of one GET at most, so that threads share a large block
_REPACK = "if `python -m data_pipelines.verify` finds the same, pack the data again"


def open_loader(config: Config, rank: int, world: int) -> Loader:
    """The loader that a configuration describes, for one rank.

    Raises WorldSizeError, ConfigError naming the key that differs from the manifest, DataError, OutputError for a
    data.cache_dir that cannot be written, and what the store raises.
    """
    data, train = config.data, config.train
    check_lanes(train.batch_size, data.num_lanes, world)
    manifest = read_manifest(data.manifest, data.endpoint_url)
    info = manifest.info
    for name in ("resolution", "channels", "num_classes"):
        wanted, found = getattr(data, name), getattr(info, name)
        if wanted != found and (name, wanted) != ("num_classes", 0):
            raise ConfigError(f"data.{name} is {wanted}, {data.manifest} has {found}; set data.{name} to {found}")
    if data.num_classes == 0:
        manifest = replace(manifest, label=np.full_like(manifest.label, -1))
    store = open_store(split_url(data.manifest)[0], data.endpoint_url)
    if data.cache_dir is not None:
        store = CachedStore(store, Path(data.cache_dir).expanduser(), data.cache_bytes)
    return Loader(
        manifest,
        store,
        batch_size=train.batch_size,
        num_lanes=data.num_lanes,
        seed=train.seed,
        rank=rank,
        world=world,
        chunk=data.chunk,
        window=data.window,
        threads=data.reader_threads,
        buffer_bytes=data.buffer_bytes,
    )


@dataclass(frozen=True)
class _Block:
    """Images on their way. positions: (n,), ascending. inverse: (n,), each position's index into `images`."""

    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    inverse: NDArray[np.int64]
    images: NDArray[np.uint8]
    futures: list[Future[None]]

    def wait(self) -> None:
        for future in self.futures:
            future.result()


class Loader:
    """Reads a data set for one rank. `batches` for training, `read` for evaluation; `close` when done.

    Raises WorldSizeError for an impossible world, and at once DataError (see `check`) if the shards are not as packed.
    threads: that fetch and decode. most_bytes: that `batches` holds at once: two blocks, the batch handed out, and each
    thread's GET. It is at most buffer_bytes unless that is too small for three batches and a small GET a thread.
    """

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        *,
        batch_size: int,
        num_lanes: int,
        seed: int,
        rank: int,
        world: int,
        chunk: int,
        window: int,
        threads: int,
        buffer_bytes: int,
    ) -> None:
        check_lanes(batch_size, num_lanes, world)
        self.manifest, self.store = manifest, store
        self.batch_size, self.num_lanes, self.rank, self.world = batch_size, num_lanes, rank, world
        self.order = Order([shard.num_images for shard in manifest.shards], seed, num_lanes, chunk, window)
        info = manifest.info
        self._shape = (info.resolution, info.resolution, info.channels)
        batch_bytes = batch_size // world * info.resolution**2 * info.channels
        spare = buffer_bytes - 3 * batch_bytes  # a batch handed out and a block on either side of it are always held
        # a quarter of the spare ones, since a store may hold a GET twice
        get_bytes = min(_GET_BYTES, spare // 4 // threads)
        self._get_bytes = max(int(manifest.length.max()), get_bytes)
        others = batch_bytes + threads * store.held_bytes(self._get_bytes)
        # half of what is left for the block that is consumed, half for the one that is fetched
        batches = max(1, (buffer_bytes - others) // 2 // batch_bytes)
        self._max_block = batches * batch_size
        self.threads, self.most_bytes = threads, 2 * batches * batch_bytes + others
        whole = -(-min(window * num_lanes, self.order.num_images) // batch_size)  # batches
        self.pieces = -(-whole // batches)
        largest = max(int(manifest.length.max()), _GET_BYTES)
        self.whole_bytes = (2 * whole + 1) * batch_bytes + threads * store.held_bytes(largest)
        self._held = _Held()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        self._etags: dict[int, str] = {}
        self.check()

    @property
    def info(self) -> DataInfo:
        """The data set's statistics, from the manifest."""
        return self.manifest.info

    def describe(self) -> list[str]:
        """Lines for people: threads, memory, shards, and whether a larger buffer would save requests."""
        lines = [
            f"reader: {self.threads} threads, at most {self.most_bytes / 1e6:.0f} MB a rank, "
            f"{len(self.manifest.shards):,} shards checked"
        ]
        if self.pieces > 1:
            lines.append(
                f"reader: a window comes in {self.pieces} pieces, and a chunk is fetched up to as often; "
                f"data.buffer_bytes={self.whole_bytes} would hold it whole"
            )
        return lines

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once until now: measured over the lives of blocks, batches and GETs, those of `read` too."""
        return self._held.peak

    def check(self) -> None:
        """Compare all shards with the manifest, and pin them. Raises DataError for missing ones and other sizes."""
        found = self.store.list()
        for number, shard in enumerate(self.manifest.shards):
            stat = found.get(shard.name)
            if stat is None:
                raise DataError(f"shard {shard.name} is missing from {self.store.url}")
            if stat.size != shard.size_bytes:
                raise DataError(
                    f"shard {shard.name} in {self.store.url} has {stat.size} bytes, the manifest says {shard.size_bytes}"
                )
            if self._etags.setdefault(number, stat.etag) != stat.etag:
                raise DataError(f"shard {shard.name} in {self.store.url} was replaced since it was first looked at")

    def batches(self, nimg: int) -> Iterator[Batch]:
        """Endless batches of this rank, (batch_size / world, C, H, W), from global position `nimg` on.

        Raises DataError naming the image and its shard when the batch that holds a damaged image is due.
        """
        blocks = self._blocks(nimg)
        ahead = deque([next(blocks)])
        share = self.batch_size // self.world
        try:
            while True:
                ahead.append(next(blocks))
                block = ahead.popleft()
                block.wait()
                for start in range(0, len(block.positions), share):
                    here = slice(start, start + share)
                    rows = block.rows[here]
                    with self._held.during(len(rows) * block.images[0].nbytes):
                        images = block.images[block.inverse[here]]
                        yield Batch(
                            images=images,
                            labels=self.manifest.label[rows],
                            positions=block.positions[here],
                            keys=tuple(self.manifest.key[rows]),
                        )
                        del images  # before the account lets it go, like the bytes of a GET in `_get`
                del block  # before the next but one is asked for: two are held at most
        finally:
            for block in ahead:
                for future in block.futures:
                    future.cancel()

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, C, H, W) uint8: the images of these manifest rows, in this order. Raises as `batches`."""
        block = self._fetch(np.arange(len(rows)), np.asarray(rows, np.int64))
        block.wait()
        return block.images[block.inverse]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _blocks(self, start: int) -> Iterator[_Block]:
        """Blocks grow up to one window of each lane: then nearly every chunk is fetched once, as a whole."""
        limit = self.batch_size
        while True:
            end = min(start + limit, self._window_end(start))
            positions = np.concatenate(
                [
                    rank_positions(nimg, self.batch_size, self.num_lanes, self.rank, self.world)
                    for nimg in range(start, end, self.batch_size)
                ]
            )
            yield self._fetch(positions, self.order.row_of(positions))
            start, limit = end, min(limit * _RAMP, self._max_block)

    def _window_end(self, start: int) -> int:
        """The first batch border at or after the end of the windows that the batch at `start` begins in."""
        size, epoch = self.order.num_images, start // self.order.num_images
        windows = self.order.window * self.num_lanes
        end = epoch * size + min(size, ((start - epoch * size) // windows + 1) * windows)
        batches = -(-(end - start) // self.batch_size)
        return start + batches * self.batch_size

    def _fetch(self, positions: NDArray[np.int64], rows: NDArray[np.int64]) -> _Block:
        """Start reading. Neighbouring rows, with small gaps at most, are one GET; a row that occurs twice is read once."""
        unique, inverse = np.unique(rows, return_inverse=True)
        manifest = self.manifest
        images = np.empty((len(unique), self._shape[2], *self._shape[:2]), np.uint8)
        self._held.while_alive(images)
        starts, shards = manifest.offset[unique], manifest.shard[unique]
        ends = starts + manifest.length[unique]
        cuts = (np.diff(shards) != 0) | (starts[1:] - ends[:-1] > _GAP_BYTES)
        futures = []
        for piece in np.split(np.arange(len(unique)), np.flatnonzero(cuts) + 1):
            while len(piece):
                fits = ends[piece] - starts[piece[0]] <= self._get_bytes
                count = max(1, int(fits.sum()))
                futures.append(self._pool.submit(self._get, unique[piece[:count]], images[piece[0] : piece[0] + count]))
                piece = piece[count:]
        return _Block(positions, rows, inverse, images, futures)

    def _get(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Fetch, check and decode rows of one shard, ascending, into `out` (n, C, H, W)."""
        manifest = self.manifest
        first, last = int(manifest.offset[rows[0]]), int(manifest.offset[rows[-1]] + manifest.length[rows[-1]])
        with self._held.during(self.store.held_bytes(last - first)):
            self._read(rows, first, last - first, out)  # its bytes end with its frame, before the account lets them go

    def _read(self, rows: NDArray[np.int64], first: int, length: int, out: NDArray[np.uint8]) -> None:
        manifest, shard = self.manifest, int(self.manifest.shard[rows[0]])
        name, etag = manifest.shards[shard].name, self._etags[shard]
        data = memoryview(self.store.read(name, first, length, etag))
        places = zip((manifest.offset[rows] - first).tolist(), manifest.length[rows].tolist(), strict=True)
        for row, (start, size), crc, image in zip(
            rows.tolist(), places, manifest.crc32[rows].tolist(), out, strict=True
        ):
            payload = data[start : start + size]
            if crc32(payload) != crc:
                cached = self.store.forget(name, first + start, size, etag)
                advice = "its cached copy is dropped, run the same command again" if cached else _REPACK
                raise DataError(f"{manifest.name(row)}: its crc32 is not the manifest's; {advice}")
            try:
                image[:] = decode(payload, self._shape).transpose(2, 0, 1)
            except (ValueError, OSError) as error:
                raise DataError(f"{manifest.name(row)}: does not decode ({error})") from None


class _Held:
    """Counts the bytes held now and at most, over all threads."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._lock = RLock()  # a finalizer may run in whatever thread and line the collector chooses

    def add(self, count: int) -> None:
        with self._lock:
            self.now += count
            self.peak = max(self.peak, self.now)

    @contextmanager
    def during(self, count: int) -> Iterator[None]:
        self.add(count)
        try:
            yield
        finally:
            self.add(-count)

    def while_alive(self, array: NDArray[np.uint8]) -> None:
        self.add(array.nbytes)
        weakref.finalize(array, self.add, -array.nbytes).atexit = False
