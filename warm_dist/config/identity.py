"""Which config keys define a network: read by resuming, the names of a sweep's trials, and evaluation."""

from __future__ import annotations

import hashlib
import json
from functools import reduce
from operator import getitem
from typing import Any

from warm_dist.config.load import dump
from warm_dist.config.run import Config

NETWORK = ("network", "process", "data.resolution", "data.channels", "data.num_classes", "train.augment")
"""Keys that make another network. Of train.augment only whether it is 0 does: the network sees the augmentations."""

RESUMED = (*NETWORK, "data.num_lanes", "data.chunk", "data.window", "train.seed")
"""Keys that a checkpoint and the run that resumes it must share, or its state would mean something else."""

INCIDENTAL = ("$schema", "description", "output", "tracking", "checkpoint", "data.endpoint_url", "data.cache_dir",
              "data.cache_bytes", "data.reader_threads", "data.buffer_bytes", "eval.cache_dir", "parallel.timeout_s",
              "parallel.preemption_file", "parallel.peak_flops", "parallel.compile_cache")  # fmt: skip
"""Keys that do not change the network, so that they may differ at the next start: addresses, folders, reading."""


def first_difference(saved: dict[str, Any], config: Config) -> tuple[str, Any, Any] | None:
    """The first key of RESUMED that differs, its saved value and its value in `config`; None if all are equal."""
    ours = dump(config)
    for key in RESUMED:
        a, b = (reduce(getitem, key.split("."), tree) for tree in (saved, ours))
        if a != b and not (key == "train.augment" and a and b):
            return key, a, b
    return None


def digest(config: Config) -> str:
    """8 hex digits of all keys that affect the network or its Fréchet distance."""
    tree = dump(config)
    for key in INCIDENTAL:
        *path, leaf = key.split(".")
        reduce(getitem, path, tree).pop(leaf, None)
    # whether it is compiled changes rounding alone; false keeps the names of trials from before it was the default
    tree["parallel"]["compile"] = False
    # as before these keys existed, or could be null
    if tree["sampler"]["precision"] is None:
        del tree["sampler"]["precision"]
    if tree["sampler"]["classes"] == "data":
        del tree["sampler"]["classes"]
    if tree["eval"] and tree["eval"]["batch_size"] is None:
        tree["eval"]["batch_size"] = 64
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def recipe(config: Config, fingerprint: str) -> str:
    """12 hex digits of all that defines the weights but train.seed: process, network, classes, training, precision, data.

    fingerprint: the data set's.
    """
    tree = dump(config)
    del tree["train"]["seed"]
    sections = {key: tree[key] for key in ("process", "network", "train")}
    sections["num_classes"] = tree["data"]["num_classes"]
    text = json.dumps([sections, tree["parallel"]["precision"], fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
