"""launch/train.py --dry-run."""

from __future__ import annotations

import pytest
import torch

from launch import train
from tests.support.commands import call
from tests.support.paths import ROOT
from warm_dist.config.run import Config
from warm_dist.errors import WorldSizeError
from warm_dist.training import dry_run
from warm_dist.training.dry_run import Passes


def test_dry_run_needs_neither_data_nor_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_gib_an_image(config: Config, images: int, weights: torch.dtype, compiled: bool) -> Passes:
        return Passes(295_941_318, [(images * 2**31, 0)])

    monkeypatch.setattr(dry_run, "passes", two_gib_an_image)  # seconds; tests/unit/training/test_dry_run.py has it
    words = ["--dry-run", "--config", ROOT / "configs" / "imagenet64.json"]
    assert call(train.main, *words, "--world-size", 32) == 0
    said = capsys.readouterr().out
    assert "batch 4096 = 32 ranks x 32 images x 4 accumulations" in said
    assert "parameters: 295,941,318" in said
    assert [line.split()[1:3] for line in said.splitlines() if "ZeRO " in line] == [
        [f"{stage}:", size] for stage, size in enumerate(("4.513", "1.309", "0.775", "0.241"))
    ]
    inputs = (3 * 128 - 32) * 2 * 4 * 3 * 64**2 / 2**30
    total = 1.309 + 64 + inputs  # the state has the gradients that stage 1 keeps
    assert f"{total:6.2f}  <- parallel.zero_stage" in said
    with pytest.raises(WorldSizeError, match="valid world sizes: 1, 2, 4"):
        call(train.main, *words, "--world-size", 12)
