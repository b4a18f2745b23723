"""launch/train.py --dry-run."""

from __future__ import annotations

import pytest

from launch import train
from tests.support.commands import call
from tests.support.paths import ROOT
from warm_dist.errors import WorldSizeError


def test_dry_run_needs_neither_data_nor_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "--config", ROOT / "configs" / "imagenet64.json"]
    assert call(train.main, *words, "--world-size", 32) == 0
    said = capsys.readouterr().out
    assert "batch 4096 = 32 ranks x 32 images x 4 accumulations" in said
    assert "parameters: 295,941,318" in said
    assert said.count("ZeRO ") == 4
    with pytest.raises(WorldSizeError, match="valid world sizes: 1, 2, 4"):
        call(train.main, *words, "--world-size", 12)
