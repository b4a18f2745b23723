"""What only a GPU can show; skipped loudly without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.worker import batches, config, info
from warm_dist import distributed
from warm_dist.spectrum import unblurred
from warm_dist.trainer import Trainer, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the GPU path is not tested here"),
]


@pytest.fixture
def world():
    yield distributed.init(60)
    distributed.shutdown()


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__precision": "fp32"},
        {"parallel__precision": "bf16"},
        {"parallel__activation_checkpointing": True, "process__residual_weight": "sampler", "train__augment": 0.3},
        {"process__preconditioning": "per_frequency", "network__arch": "ncsnpp"},
    ],
    ids=["fp32", "bf16", "recompute", "per_frequency"],
)
def test_a_step_never_waits_for_the_device(world, tmp_path: Path, changes):
    settings = config(tmp_path, engine="local", **changes)
    trainer = Trainer(settings, world, info(), tmp_path, print)
    source = batches(world, 0)
    steps = [prepare(next(source), settings, info(), world.device) for _ in range(4)]
    trainer.step(steps[0])  # the first one makes Adam's state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for data in steps[1:]:
            trainer.step(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_draws_and_residual_are_those_of_the_cpu(world, tmp_path: Path):
    settings = config(
        tmp_path, engine="local", process__bnr={"kind": "uniform", "low": 0, "high": 2}, sampler={"bnr": 1}
    )
    batch = next(batches(world, 0))
    cpu, gpu = (prepare(batch, settings, info(), torch.device(d)) for d in ("cpu", "cuda"))
    assert torch.equal(cpu.noise, gpu.noise.cpu())
    assert torch.equal(cpu.x0, gpu.x0.cpu())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu.level, gpu.level, strict=True))
    torch.backends.cuda.matmul.allow_tf32 = True  # what a user may have set
    alpha = torch.full((len(gpu.x0),), 0.001)
    exact = unblurred(cpu.x0.double(), alpha)
    ours = unblurred(gpu.x0, alpha.cuda()).cpu().double()
    assert float((ours - exact).norm() / exact.norm()) < 1e-5
    assert torch.backends.cuda.matmul.allow_tf32
