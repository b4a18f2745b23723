"""What must be fast; no test of the unit tier looks at a clock."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from data_pipelines.reading.lanes import Order
from warm_dist.distributed.heartbeat import Heartbeat
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World


def test_an_order_of_imagenets_size_takes_well_under_a_second() -> None:
    order = Order([1024] * 1251, 0, 64, 64, 1024)
    started = time.perf_counter()
    rows = order.rows(0)
    assert time.perf_counter() - started < 2  # 0.2 s on one idle core; a python loop takes 10 s or more
    assert len(rows) == 1251 * 1024


def test_a_place_costs_next_to_nothing(tmp_path: Path) -> None:
    beat = Heartbeat(World(0, 1, torch.device("cpu"), None), tmp_path, 2.0, StopSignal())
    costs = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(1000):
            beat.at("forward", 8)
        costs.append((time.perf_counter() - began) / 1000)
    assert min(costs) < 2e-6  # seconds; about 0.15e-6 measured
