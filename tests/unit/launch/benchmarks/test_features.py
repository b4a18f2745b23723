"""The verdicts of the features benchmark."""

from __future__ import annotations

import re

import pytest
import torch

from launch import bench
from launch.benchmarks.features import FeaturesBench
from launch.benchmarks.features import table as features_table
from tests.support.commands import call
from warm_dist.errors import ConfigError


def test_features_need_images() -> None:
    """Fault: too few images end in an error in the middle of the measurement."""
    with pytest.raises(ConfigError, match="--num-images must be at least 4"):
        call(bench.main, "features", "--num-images", 3)


@pytest.mark.parametrize(("ours", "bf16", "distance_s", "met"), [(70, 30, 2.0, True), (90, 50, 4.0, False)])
def test_verdicts_of_features(ours: float, bf16: float, distance_s: float, met: bool) -> None:
    """Fault: a missed target is printed as met, or a ratio is upside down."""
    measured = FeaturesBench({}, torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    measured.cpu_ms = {"clean-fid": [100.0, 100.0], "ours": [ours, ours], "ours, bf16": [bf16, bf16]}
    measured.distance_s = {4096: [distance_s, distance_s]}
    report = measured.report()
    assert report["ratios"]["ours"]["median"] == pytest.approx(ours / 100)
    text = features_table(report | {"bf16": {"float32": 2.0, "bf16": 2.1, "error": 0.1, "relative": 0.05}})
    word = "met" if met else "missed"
    for name, target in (("ours", "0.8"), ("ours, bf16", "0.4"), ("4096 images each", "3")):
        assert re.search(rf"^{name} .* target {target}: {word}$", text, re.M)
    assert text.endswith("error +0.1000 (+5.00%)")
