"""Which keys make another network: what resuming, sweeps' trial names and evaluation's recipes compare."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from warm_dist.config.load import dump
from warm_dist.config.run import Config

if TYPE_CHECKING:
    from warm_dist.checkpoints.weights import Model


# of the config, what a checkpoint must have been made with: the state would mean something else
RESUMED = ("network", "process", "data.num_lanes", "data.chunk", "data.window", "train.seed")


def value_at(tree: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


# What does not make another network, so may be another at the next start: addresses, folders, and how reading is done.
INCIDENTAL = ("$schema", "description", "output", "tracking", "checkpoint", "data.endpoint_url", "data.cache_dir",
               "data.cache_bytes", "data.reader_threads", "data.buffer_bytes", "eval.cache_dir", "parallel.timeout_s",
               "parallel.preemption_file", "parallel.peak_flops")  # fmt: skip


def digest(config: Config) -> str:
    """8 hex digits of what makes the network and its distance."""
    tree = dump(config)
    for key in INCIDENTAL:
        *parents, leaf = key.split(".")
        inner = tree
        for parent in parents:
            inner = inner[parent]
        inner.pop(leaf, None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def recipe(model: Model) -> str:
    """A hash of what made the weights but chance (train.seed): data, process, network, training, precision."""
    from warm_dist.config.load import dump

    tree = dump(model.config)
    made_by = {key: tree[key] for key in ("process", "network", "train")}
    del made_by["train"]["seed"]
    text = json.dumps([made_by, tree["parallel"]["precision"], model.info.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
