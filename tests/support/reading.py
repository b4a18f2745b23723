"""Reading a packed data set in tests: a reader with small defaults, batches compared, ranks' shares joined."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np

from data_pipelines.reading.loader import Loader
from data_pipelines.shards.manifest import Manifest
from tests.support.packed import Packed
from tests.support.paths import ROOT
from warm_dist.config.run import validate
from warm_dist.data import Batch
from warm_dist.store.base import Store

DEFAULTS: dict[str, Any] = {
    "batch_size": 32,
    "num_lanes": 8,
    "seed": 3,
    "rank": 0,
    "world": 1,
    "chunk": 16,
    "window": 64,
    "threads": 2,
    "buffer_bytes": 1 << 20,
}


def loader(manifest: Manifest, store: Store, **changes: Any) -> Loader:
    return Loader(manifest, store, **{**DEFAULTS, **changes})


def take(manifest: Manifest, store: Store, nimg: int, count: int, **changes: Any) -> list[Batch]:
    with closing(loader(manifest, store, **changes)) as reader:
        return list(islice(reader.batches(nimg), count))


def equal(one: Batch, other: Batch) -> bool:
    return (
        np.array_equal(one.images, other.images)
        and np.array_equal(one.labels, other.labels)
        and np.array_equal(one.positions, other.positions)
        and one.keys == other.keys
    )


def joined(parts: list[Batch]) -> Batch:
    """The global batch from the ranks' shares."""
    order = np.argsort(np.concatenate([part.positions for part in parts]))
    return Batch(
        np.concatenate([part.images for part in parts])[order],
        np.concatenate([part.labels for part in parts])[order],
        np.concatenate([part.positions for part in parts])[order],
        tuple(np.concatenate([np.array(part.keys) for part in parts])[order].tolist()),
    )


def config(packed: Packed, **data: Any) -> Any:
    tree = json.loads((ROOT / "configs" / "quickstart.json").read_text())
    tree["data"] = {
        "manifest": packed.manifest_url,
        "endpoint_url": packed.endpoint_url,
        "resolution": 8,
        "channels": 1,
        "num_lanes": 8,
        "chunk": 16,
        "window": 64,
        **data,
    }
    tree["network"]["channel_mult"], tree["network"]["attention_resolutions"] = [1, 2], []
    tree["train"]["seed"] = 3
    return validate(tree)
