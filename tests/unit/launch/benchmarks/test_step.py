"""The verdicts of the step benchmark."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from launch import bench
from launch.benchmarks.step import StepBench
from launch.benchmarks.step import table as step_table
from tests.support.commands import call
from warm_dist.cpus import usable_cpus
from warm_dist.errors import ConfigError


def test_a_step_needs_positive_counts() -> None:
    """Fault: --lines 1, which leaves nothing to time after the first line, is accepted."""
    with pytest.raises(ConfigError, match="--lines at least 2"):
        call(bench.main, "step", "--lines", 1)


def step_report(side_s: float, many_images_per_s: float) -> dict[str, Any]:
    """Two rounds of made-up runs: a step of 100 ms of which `side_s` is for EMAs and metrics; 20 images a second alone."""
    args = argparse.Namespace(ranks=[2], rounds=2, images=2, log_steps=5, config="configs/quickstart.json", set=[])
    measured = StepBench(args, Path(), "http://127.0.0.1:1")
    places = dict.fromkeys(("data_s", "forward_s", "backward_s", "update_s", "ema_s"), 0.02)
    one = {"wall_s": 0.1, "process_s": 0.1, "main_s": 0.1 + side_s, "side_s": side_s, "mirror_s": 0.001, **places}
    one |= {"mirror_start_s": 3.0, "images_per_s": 20.0, "parameters": 1e6, "flops": 1e9, "bandwidth": 1e9}
    measured.runs = {name: [one, one] for name in ("bare", "one", "mirror")}
    measured.runs["2 ranks"] = [one | {"images_per_s": many_images_per_s}] * 2
    return measured.report()


@pytest.mark.parametrize(("side_s", "speed", "side", "speedup"), [(0.0005, 38, True, True), (0.002, 35, False, False)])
def test_verdicts_of_a_step(side_s: float, speed: float, side: bool, speedup: bool) -> None:
    """Fault: a missed target is printed as met, or the mirror's time is not counted."""
    report = step_report(side_s, speed)
    assert report["side"]["median"] == pytest.approx((side_s + 0.001) / 0.1)  # the mirror's millisecond counts
    assert report["side"]["met"] is side
    assert report["speedup"]["2 ranks"]["median"] == pytest.approx(speed / 40)
    text = step_table(report)
    assert re.search(rf"^together .* target 2: {'met' if side else 'missed'}$", text, re.M)
    assert report["speedup"]["2 ranks"]["target"] == (0.9 if usable_cpus() > 1 else None)
    if usable_cpus() > 1:
        assert re.search(rf"^2 ranks .* target 0.9: {'met' if speedup else 'missed'}$", text, re.M)
