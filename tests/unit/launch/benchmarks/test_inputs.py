"""The rate at which a host prepares steps."""

from __future__ import annotations

import time
from typing import Any

import torch

from launch.benchmarks.inputs import prepare_rate, rates
from tests.support.paths import ROOT
from warm_dist.config.run import load_config
from warm_dist.training import inputs


def test_a_rate_is_images_over_processor_time_without_the_first_batch(monkeypatch) -> None:
    """Fault: the first batch, which fills caches, is counted, or batches are drawn on all cores or at one position."""
    config = load_config(ROOT / "configs" / "cifar10.json", ["train.batch_size=128"])
    seconds = iter([100.0, 1.0, 4.0, 2.0])
    clock, seen = [0.0], []

    def prepare(batch: Any, *others: Any) -> None:
        seen.append((batch.images.shape, batch.positions[0], torch.get_num_threads()))
        clock[0] += next(seconds)

    monkeypatch.setattr(inputs, "prepare", prepare)
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])
    threads = torch.get_num_threads()
    rate = prepare_rate(config, 3)
    assert (rate.median, rate.min, rate.max) == (64.0, 32.0, 128.0)
    assert seen == [((128, 3, 32, 32), 128 * k, 1) for k in range(4)]
    assert torch.get_num_threads() == threads


def test_the_shipped_configs_can_be_prepared() -> None:
    found = rates(1)
    assert found.keys() == {"cifar10", "imagenet64"}
    assert all(rate.median > 0 for rate in found.values())
