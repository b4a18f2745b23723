"""The order of the data: a pure function of (seed, epoch, shard sizes), dealt to lanes, so that resuming is seeking.

Global position p counts images for ever: epoch p // N, lane p mod L. A rank owns L / world neighbouring lanes; which
image stands at p depends neither on the world size nor on the batch size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from warm_dist.rng import generator

_CACHED_EPOCHS = 2  # a batch may span two


class Order:
    """Which manifest row stands at which position.

    shard_sizes: images per shard; rows count through the shards. chunk: neighbouring images that are permuted as one,
    so that one ranged GET fetches them. window: images of a lane that are shuffled among each other.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, num_lanes: int, chunk: int, window: int) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        self.num_images = int(sizes.sum())
        if self.num_images == 0 or min(num_lanes, chunk, window) < 1:
            raise ValueError(
                f"{self.num_images} images, {num_lanes} lanes, chunk {chunk}, window {window}: all must be > 0"
            )
        self.seed, self.num_lanes, self.window = seed, num_lanes, window
        # each shard is cut into chunks, the last one of a shard may be shorter
        counts = -(-sizes // chunk)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._starts = np.repeat(np.cumsum(sizes) - sizes, counts) + within * chunk
        self._lengths = np.minimum(chunk, np.repeat(sizes, counts) - within * chunk)
        self._cache: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._lock = Lock()

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """(N,) int64: the manifest row at each position of the epoch; every row exactly once. Read-only."""
        with self._lock:
            if epoch not in self._cache:
                self._cache[epoch] = self._make(epoch)
                while len(self._cache) > _CACHED_EPOCHS:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(epoch)
            return self._cache[epoch]

    def row_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Manifest rows at global positions, shape of `positions`."""
        epochs, within = np.divmod(positions, self.num_images)
        out = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self.rows(int(epoch))[within[here]]
        return out

    def _make(self, epoch: int) -> NDArray[np.int64]:
        n, lanes = self.num_images, self.num_lanes
        # raw bits and stable sorts: numpy may change permutation() and shuffle() between versions, these never
        bits = generator(self.seed, "order", epoch).bit_generator.random_raw
        chunks = np.argsort(bits(len(self._starts)), kind="stable")
        lengths = self._lengths[chunks]
        ends = np.cumsum(lengths)
        sequence = np.arange(n) + np.repeat(self._starts[chunks] - (ends - lengths), lengths)
        # lane l gets as many images as the epoch has positions p with p mod L = l, in one piece
        first = (np.arange(lanes) - epoch * n) % lanes  # the lane's first position within the epoch
        sizes = np.maximum(0, -(-(n - first) // lanes))
        piece = np.cumsum(sizes) - sizes
        windows = -(-sizes // self.window)
        index = np.arange(n) - np.repeat(piece, sizes)
        window = np.repeat(np.cumsum(windows) - windows, sizes) + index // self.window
        # windows stay in their order, images inside one are ordered by 40 random bits
        shuffled = sequence[np.argsort((window << 40) | (bits(n) >> np.uint64(24)).astype(np.int64), kind="stable")]
        position = np.arange(n)
        rows: NDArray[np.int64] = shuffled[piece[(epoch * n + position) % lanes] + position // lanes]
        rows.flags.writeable = False
        return rows


def rank_positions(nimg: int, batch_size: int, num_lanes: int, rank: int, world: int) -> NDArray[np.int64]:
    """(batch_size / world,) int64: the rank's positions in the global batch [nimg, nimg + batch_size), ascending."""
    positions = np.arange(nimg, nimg + batch_size, dtype=np.int64)
    mine = (positions % num_lanes) // (num_lanes // world) == rank
    return np.compress(mine, positions)
