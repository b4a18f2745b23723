"""Reads batches from any position: ranged GETs in threads, in order, bounded memory, every crc32 checked.

Reading proceeds in blocks of consecutive batches: a block's rows are sorted by offset, neighbours are merged into one
GET, and the next block is fetched while one is consumed. The content of a batch depends on none of this.
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
from warm_dist.errors import ConfigError, DataError, print_once
from warm_dist.store.base import Store, split_url
from warm_dist.store.cache import CachedStore
from warm_dist.store.open import open_store

_RAMP = 4  # growth of blocks; small first blocks make the first batch fast
# Smaller gaps between images are read and dropped: a request takes as long as this many bytes.
# Derived: 3 ms a request (measured, SeaweedFS on loopback) at 20 MB/s for each thread.
_GAP_BYTES = 64 << 10
_GET_BYTES = 8 << 20  # limit of one GET, so that threads share a large block
_REPACK = "if `python -m data_pipelines.verify` finds the same, pack the data again"


def open_loader(config: Config, rank: int, world: int) -> Loader:
    """The loader of a config, for one rank.

    Raises WorldSizeError, ConfigError naming a key that differs from the manifest, DataError, OutputError for a
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
        store = CachedStore(store, Path(data.cache_dir), data.cache_bytes)
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
    """Images being fetched. positions: (n,), ascending. inverse: (n,), each position's index into `images`."""

    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    inverse: NDArray[np.int64]
    images: NDArray[np.uint8]
    futures: list[Future[None]]

    def wait(self) -> None:
        for future in self.futures:
            future.result()


class Loader:
    """Reads a data set for one rank: `batches` for training, `read` for evaluation; `close` when done.

    threads: number that fetch and decode. most_bytes: the most that `batches` holds at once (two blocks, the current batch
    and each thread's GET), at most buffer_bytes unless that is too small for three batches and a small GET a thread.
    Raises WorldSizeError for an impossible world, DataError (see `check`) if the shards are not as packed.
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
        spare = buffer_bytes - 3 * batch_bytes  # the current batch and two blocks of at least one are always held
        # a quarter of the spare bytes, since a store may hold a GET twice
        get_bytes = min(_GET_BYTES, spare // 4 // threads)
        self._get_bytes = max(int(manifest.length.max()), get_bytes)
        others = batch_bytes + threads * store.held_bytes(self._get_bytes)
        # the rest is shared by the block being consumed and the one being fetched
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
        """Lines for the user: threads, memory, shards, and whether a larger buffer would save requests."""
        memory, shards = f"{self.most_bytes / 1e6:.0f} MB a rank", f"{len(self.manifest.shards):,} shards checked"
        lines = [f"reader: {self.threads} threads, at most {memory}, {shards}"]
        if self.pieces > 1:
            lines.append(
                f"reader: a window comes in {self.pieces} pieces, and a chunk is fetched up to as often; "
                f"data.buffer_bytes={self.whole_bytes} would hold it whole"
            )
        return lines

    @property
    def peak_bytes(self) -> int:
        """The most bytes held at once so far, measured over blocks, batches and GETs, including those of `read`."""
        return self._held.peak

    def check(self) -> None:
        """Check all shards against the manifest and pin their versions.

        Raises DataError for a missing shard, another size, or a shard replaced since the first check.
        """
        found = self.store.list()
        for number, shard in enumerate(self.manifest.shards):
            stat = found.get(shard.name)
            if stat is None:
                raise DataError(f"shard {shard.name} is missing from {self.store.url}")
            if stat.size != shard.size_bytes:
                sizes = f"{stat.size} bytes, the manifest says {shard.size_bytes}"
                raise DataError(f"shard {shard.name} in {self.store.url} has {sizes}")
            if self._etags.setdefault(number, stat.etag) != stat.etag:
                raise DataError(f"shard {shard.name} in {self.store.url} was replaced since it was first checked")

    def batches(self, nimg: int) -> Iterator[Batch]:
        """Endless batches of this rank from global position `nimg`; images are (batch_size / world, C, H, W).

        Raises DataError naming image and shard when a batch with a damaged image is due.
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
                        del images  # before it stops being counted
                del block  # before another is fetched, so that at most two are held
        finally:
            for block in ahead:
                for future in block.futures:
                    future.cancel()

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of these manifest rows in order, (n, C, H, W) uint8. Raises as `batches`."""
        block = self._fetch(np.arange(len(rows)), np.asarray(rows, np.int64))
        block.wait()
        return block.images[block.inverse]

    def close(self) -> None:
        """Stop the threads, without waiting for an answer that one of them waits for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _blocks(self, start: int) -> Iterator[_Block]:
        """Blocks of growing size, up to one window of each lane: nearly every chunk is then fetched once, as a whole."""
        limit, size = self.batch_size, self.batch_size
        while True:
            end = min(start + limit, self._window_end(start))
            layout = size, self.num_lanes, self.rank, self.world
            positions = np.concatenate([rank_positions(nimg, *layout) for nimg in range(start, end, size)])
            yield self._fetch(positions, self.order.row_of(positions))
            start, limit = end, min(limit * _RAMP, self._max_block)

    def _window_end(self, start: int) -> int:
        """The first batch border at or after the end of the windows in which the batch at `start` begins."""
        size, epoch = self.order.num_images, start // self.order.num_images
        windows = self.order.window * self.num_lanes
        end = epoch * size + min(size, ((start - epoch * size) // windows + 1) * windows)
        batches = -(-(end - start) // self.batch_size)
        return start + batches * self.batch_size

    def _fetch(self, positions: NDArray[np.int64], rows: NDArray[np.int64]) -> _Block:
        """Start fetching. Rows with small gaps share a GET; a row that occurs twice is read once."""
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
                out = [images[piece[0] : piece[0] + count]]
                futures.append(self._pool.submit(self._get, unique[piece[:count]], out))
                piece = piece[count:]
        return _Block(positions, rows, inverse, images, futures)

    def _get(self, rows: NDArray[np.int64], out: list[NDArray[np.uint8]]) -> None:
        """Fetch, check and decode rows of one shard, ascending, into the array that `out` holds, (n, C, H, W).

        It is taken out of the list, since the pool may keep a call's arguments for a moment after its result.
        """
        manifest = self.manifest
        first, last = int(manifest.offset[rows[0]]), int(manifest.offset[rows[-1]] + manifest.length[rows[-1]])
        with self._held.during(self.store.held_bytes(last - first)):
            # the bytes are freed with its frame, before the count drops
            self._read(rows, first, last - first, out.pop())

    def _read(self, rows: NDArray[np.int64], first: int, length: int, out: NDArray[np.uint8]) -> None:
        manifest, shard = self.manifest, int(self.manifest.shard[rows[0]])
        name, etag = manifest.shards[shard].name, self._etags[shard]
        payloads, wrong = self._payloads(rows, first, self.store.read(name, first, length, etag))
        if wrong is not None:  # in a cache, or on the way: the object itself cannot have changed
            cached = self.store.forget(name, first, length, etag)
            print_once(
                f"{manifest.name(wrong)}: {'its cached copy' if cached else 'what arrived'} is damaged; read again"
            )
            payloads = []  # frees the bytes
            payloads, wrong = self._payloads(rows, first, self.store.read(name, first, length, etag))
        if wrong is not None:
            raise DataError(f"{manifest.name(wrong)}: its crc32 is not the manifest's; {_REPACK}")
        for row, payload, image in zip(rows.tolist(), payloads, out, strict=True):
            try:
                image[:] = decode(payload, self._shape).transpose(2, 0, 1)
            except (ValueError, OSError) as error:
                raise DataError(f"{manifest.name(row)}: does not decode ({error})") from None

    def _payloads(self, rows: NDArray[np.int64], first: int, data: bytes) -> tuple[list[memoryview], int | None]:
        """The rows' bytes in `data`, which begins at `first` of their shard, and the first row whose crc32 is wrong."""
        starts, sizes = self.manifest.offset[rows] - first, self.manifest.length[rows]
        whole = memoryview(data)
        out = [whole[start : start + size] for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]
        right = zip(rows.tolist(), out, self.manifest.crc32[rows].tolist(), strict=True)
        return out, next((row for row, payload, crc in right if crc32(payload) != crc), None)


class _Held:
    """Counts the bytes held now and their peak, over all threads."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._lock = RLock()  # a finalizer may run in any thread, even one that holds the lock

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
