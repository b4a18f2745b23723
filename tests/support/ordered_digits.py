"""The digits, and what must come at each position: computed from the order alone, without the loader."""

from __future__ import annotations

import numpy as np

from data_pipelines.reading.lanes import Order
from data_pipelines.reading.loader import Loader
from data_pipelines.sources.open import open_source
from tests.support.packed import Packed
from tests.support.reader import OPTIONS
from warm_dist.data import Batch
from warm_dist.store.open import open_store

N = 1797


class OrderedDigits:
    """packed: the digits in shards of 500."""

    def __init__(self, packed: Packed) -> None:
        self.store = open_store(packed.url, packed.endpoint_url)
        self.manifest = packed.manifest
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
