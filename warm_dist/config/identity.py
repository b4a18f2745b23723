"""Which keys of a config make another network, written once: resuming, sweeps' trial names and evaluation read it here."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from warm_dist.config.load import dump
from warm_dist.config.run import Config

RESUMED = ("network", "process", "data.num_lanes", "data.chunk", "data.window", "train.seed")
"""What a checkpoint and the run that resumes it must share: with other values its state would mean something else."""

INCIDENTAL = ("$schema", "description", "output", "tracking", "checkpoint", "data.endpoint_url", "data.cache_dir",
              "data.cache_bytes", "data.reader_threads", "data.buffer_bytes", "eval.cache_dir", "parallel.timeout_s",
              "parallel.preemption_file", "parallel.peak_flops")  # fmt: skip
"""What does not change the network: addresses, folders, and how data are read. It may differ at the next start."""


def first_difference(saved: dict[str, Any], config: Config) -> tuple[str, Any, Any] | None:
    """The first key of RESUMED in which a saved config (a tree) and this one differ, with both values; None if equal."""
    ours = dump(config)
    for key in RESUMED:
        a, b = _value(saved, key), _value(ours, key)
        if a != b:
            return key, a, b
    return None


def digest(config: Config) -> str:
    """8 hex digits of everything that makes the network and its Fréchet distance."""
    tree = dump(config)
    for key in INCIDENTAL:
        path, _, leaf = key.rpartition(".")
        _value(tree, path).pop(leaf, None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def recipe(config: Config, fingerprint: str) -> str:
    """12 hex digits of what made the weights except chance (train.seed): data, process, network, training, precision.

    fingerprint: of the data.
    """
    tree = dump(config)
    made_by = {key: tree[key] for key in ("process", "network", "train")}
    del made_by["train"]["seed"]
    text = json.dumps([made_by, tree["parallel"]["precision"], fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _value(tree: dict[str, Any], path: str) -> Any:
    for key in path.split(".") if path else ():
        tree = tree[key]
    return tree
