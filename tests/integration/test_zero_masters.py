"""ZeRO's masters and forward weights, on one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.engine_worker import SMALL
from tests.support.tiny_run import config
from warm_dist.distributed.world import World, join, shutdown
from warm_dist.networks.unet import build
from warm_dist.training.deepspeed_engine import build_engine


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    before = dict(os.environ)
    yield join(60)
    shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_zero_s_masters_are_float32_and_the_forward_weights_follow_them(world, tmp_path, stage, precision):
    """What a checkpoint writes into the masters is what the next forward pass computes with."""
    settings = config(tmp_path, **SMALL, parallel__zero_stage=stage, parallel__precision=precision)
    engine = build_engine(build(settings), settings, world)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    level = torch.zeros(2)
    before = engine(x, level, level, None).detach().float()
    assert {f.master.dtype for f in engine.fragments()} == {torch.float32}
    for f in engine.fragments():
        if f.name == "flat":  # with the last layer
            f.master.add_(1.0)
    engine.after_load(5)
    after = engine(x, level, level, None).detach().float()
    assert float((after - before).abs().max()) > 0.5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_without_a_limit_is_not_clipped(world, tmp_path, stage):
    """Fault: DeepSpeed's own default, which clips to a norm of 1 where its config says nothing."""
    settings = config(tmp_path, **{**SMALL, "train__clip": None}, parallel__zero_stage=stage)
    engine = build_engine(build(settings), settings, world)
    level = torch.zeros(2)
    for _ in range(engine.num_accumulation):
        engine.backward(1e8 * engine(torch.randn(2, 3, 8, 8), level, level, None).square().mean())
    norm = float(engine.step(1e-3))
    assert norm > 10
    moment = torch.cat([f.exp_avg for f in engine.fragments()])
    assert float(moment.norm()) == pytest.approx(0.1 * norm, rel=1e-3)  # 1 - Adam's beta
