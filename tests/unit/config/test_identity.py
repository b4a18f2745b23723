"""Which keys a resume may not change, which do not change a trial's name, and which make another recipe."""

from __future__ import annotations

import re
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest

from tests.support.evaluators import EVAL
from tests.support.tiny_run import config
from warm_dist.config.identity import INCIDENTAL, RESUMED, digest, first_difference, recipe
from warm_dist.config.load import assign, dump
from warm_dist.config.run import Config, validate

BASE = config(Path("run"), eval=EVAL)
PLACES: dict[str, Any] = {
    "$schema": "schema.json",
    "description": "words",
    "output": "elsewhere",
    "tracking": {"experiment": "another"},
    "checkpoint": {"keep_last": 9},
    "data.endpoint_url": "http://another:1",
    "data.cache_dir": "cache",
    "data.cache_bytes": 9,
    "data.reader_threads": 9,
    "data.buffer_bytes": 9,
    "eval.cache_dir": "cache",
    "parallel.timeout_s": 9,
    "parallel.preemption_file": "stop",
    "parallel.peak_flops": 1e12,
    "parallel.compile_cache": "/kernels",
}
WEIGHTS: dict[str, Any] = {
    "process.bnr": 0.25,
    "network.channels": 32,
    "data.num_classes": 4,
    "train.lr": 0.5,
    "train.horizontal_flips": False,
    "parallel.precision": "bf16",
}
CHANGES: dict[str, tuple[str, Any]] = {
    "network": ("network.channels", 32),
    "process": ("process.p_mean", 0.5),
    "data.resolution": ("data.resolution", 16),
    "data.channels": ("data.channels", 1),
    "data.num_classes": ("data.num_classes", 4),
    "train.augment": ("train.augment", 0.5),
    "data.num_lanes": ("data.num_lanes", 8),
    "data.chunk": ("data.chunk", 8),
    "data.window": ("data.window", 8),
    "train.seed": ("train.seed", 7),
}
MEASURES: dict[str, Any] = {"eval.num_images": 21, "sampler.num_steps": 9}


def changed(key: str, value: Any) -> Config:
    tree = dump(BASE)
    assign(tree, key, value, key)
    return validate(tree)


@pytest.mark.parametrize("key", CHANGES)
def test_a_resume_names_the_key_that_differs(key: str) -> None:
    """Fault: a checkpoint of another network, process, order of images or seed is resumed from."""
    saved = dump(BASE)
    assign(saved, *CHANGES[key], key)
    there, here = (reduce(getitem, key.split("."), tree) for tree in (saved, dump(BASE)))
    assert first_difference(saved, BASE) == (key, there, here)
    assert there != here


def test_a_resume_may_change_all_else_and_is_told_the_first_difference() -> None:
    """Fault: a run cannot be resumed with another learning rate or more reader threads."""
    assert CHANGES.keys() == set(RESUMED)
    assert first_difference(dump(BASE), BASE) is None
    for key, value in {**PLACES, **MEASURES, "train.lr": 0.5, "train.total_nimg": 1600}.items():
        assert first_difference(dump(changed(key, value)), BASE) is None, key
    more, less = changed("train.augment", 0.5), changed("train.augment", 0.1)
    assert first_difference(dump(more), less) is None, "the same network, seldom or often augmented"
    saved = dump(changed("train.seed", 7))
    assert first_difference(saved, BASE) == ("train.seed", 7, 0)
    saved["data"]["chunk"] = 1
    assert first_difference(saved, BASE) == ("data.chunk", 1, BASE.data.chunk)


def test_a_digest_is_of_all_but_places() -> None:
    """Fault: a trial that reads its data from another address is another trial, or two trials share one folder."""
    assert PLACES.keys() == set(INCIDENTAL)
    assert re.fullmatch("[0-9a-f]{8}", digest(BASE))
    assert {key for key, value in PLACES.items() if digest(changed(key, value)) != digest(BASE)} == set()
    assert {digest(changed("parallel.compile", value)) for value in (None, False, True)} == {digest(BASE)}
    others = {**WEIGHTS, **MEASURES, "data.manifest": "another", "data.window": 9, "train.seed": 7, "engine": "local"}
    assert len({digest(BASE), *(digest(changed(key, value)) for key, value in others.items())}) == len(others) + 1


def test_seeds_share_a_recipe_and_weights_of_another_kind_do_not() -> None:
    """Fault: a surface takes the networks of several seeds for several recipes, or those of other data for one."""
    mine = recipe(BASE, "data")
    assert re.fullmatch("[0-9a-f]{12}", mine)
    for key, value in {**PLACES, **MEASURES, "train.seed": 7, "data.window": 9}.items():
        assert recipe(changed(key, value), "data") == mine, key
    others = {recipe(changed(key, value), "data") for key, value in WEIGHTS.items()}
    assert len({mine, recipe(BASE, "other data"), *others}) == len(WEIGHTS) + 2
