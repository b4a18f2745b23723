"""The order of the data: a pure function of (seed, epoch, shard sizes), so that resuming is seeking.

Global position p counts all images read: epoch p // N, lane p mod L. A rank owns L / world neighbouring lanes. The image
at p depends neither on the world size nor on the batch size.
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
    """Maps positions to manifest rows.

    shard_sizes: images per shard; rows count through the shards. chunk: number of neighbouring images that stay together,
    so that one ranged GET fetches them. window: number of a lane's images that are shuffled among each other.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, num_lanes: int, chunk: int, window: int) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        self.num_images = int(sizes.sum())
        if self.num_images == 0 or min(num_lanes, chunk, window) < 1:
            given = f"{self.num_images} images, {num_lanes} lanes, chunk {chunk}, window {window}"
            raise ValueError(f"{given}: all must be > 0")
        self.seed, self.num_lanes, self.window = seed, num_lanes, window
        # each shard is cut into chunks; its last one may be shorter
        counts = -(-sizes // chunk)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._starts = np.repeat(np.cumsum(sizes) - sizes, counts) + within * chunk
        self._lengths = np.minimum(chunk, np.repeat(sizes, counts) - within * chunk)
        self._cache: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._lock = Lock()

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """The manifest row at each position of the epoch, (N,) int64, every row exactly once. Read-only."""
        with self._lock:
            if epoch not in self._cache:
                self._cache[epoch] = self._make(epoch)
                while len(self._cache) > _CACHED_EPOCHS:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(epoch)
            return self._cache[epoch]

    def row_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The manifest rows at global positions, in the shape of `positions`."""
        epochs, within = np.divmod(positions, self.num_images)
        out = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self.rows(int(epoch))[within[here]]
        return out

    def _make(self, epoch: int) -> NDArray[np.int64]:
        n, lanes = self.num_images, self.num_lanes
        # raw bits and stable sorts, because numpy may change permutation() and shuffle() between versions
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
    """The rank's positions in the global batch [nimg, nimg + batch_size), (batch_size / world,) int64, ascending."""
    positions = np.arange(nimg, nimg + batch_size, dtype=np.int64)
    mine = (positions % num_lanes) // (num_lanes // world) == rank
    return np.compress(mine, positions)
