"""What only a GPU can show; skipped loudly without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.engine_worker import keeping
from tests.support.tiny_run import batches, config, info, start, steps
from warm_dist.diffusion.spectrum import unblurred
from warm_dist.distributed.world import join, shutdown
from warm_dist.training.engine import STATE
from warm_dist.training.inputs import Prefetch, prepare
from warm_dist.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the GPU path is not tested here"),
]


@pytest.fixture(scope="module")  # DeepSpeed keeps the process group that it saw first
def world():
    yield join(60)
    shutdown()


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__precision": "fp32"},
        {"parallel__precision": "bf16"},
        {"parallel__activation_checkpointing": True, "process__residual_weight": "sampler", "train__augment": 0.3},
        {"process__preconditioning": "per_frequency", "network__arch": "ncsnpp"},
        {"parallel__precision": "bf16", "parallel__compile": True},
    ],
    ids=["fp32", "bf16", "recompute", "per_frequency", "compile"],
)
def test_a_step_never_waits_for_the_device(world, tmp_path: Path, changes):
    settings = config(tmp_path, engine="local", **{"parallel__compile": False, **changes})
    trainer = Trainer(settings, world, info(), print)
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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_is_on_the_host_and_gives_the_same_losses(world, tmp_path: Path, stage):
    found = {}
    for offload in (False, True):
        changes = {"parallel__zero_stage": stage, "parallel__offload_optimizer": offload, "parallel__compile": False}
        trainer = start(world, config(tmp_path / str(offload), **changes))
        found[offload] = steps(world, trainer, 10)[0]
        devices = {getattr(f, key).device.type for f in trainer.engine.fragments() for key in STATE}
        assert devices == {"cpu" if offload else "cuda"}
        assert {value.device.type for value in trainer.emas["ema"].values} == devices
        assert trainer.grad_norm.device == world.device
    # the same gradients; Adam on a processor and on a GPU round differently
    assert found[True] == pytest.approx(found[False], rel=1e-4)


@pytest.mark.parametrize("kept", [True, False])
def test_stage_3_gives_the_losses_of_the_local_engine(world, tmp_path: Path, kept):
    """Fault: weights used before they are gathered, which is on another stream, or freed while a kernel reads them."""
    found = {}
    for name, changes in (("local", {"engine": "local"}), ("zero3", {"parallel__zero_stage": 3})):
        with keeping(kept):
            trainer = start(world, config(tmp_path / name, parallel__compile=False, **changes))
        found[name] = steps(world, trainer, 20)[0]
    assert {p.ds_status.name for p in trainer.engine.module.parameters()} == {"NOT_AVAILABLE"}
    assert found["zero3"] == pytest.approx(found["local"], rel=1e-4)


def test_draws_and_residual_are_those_of_the_cpu(world, tmp_path: Path):
    """Fault: noise from the device's own generator, or a residual computed in TF32."""
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


def test_batches_are_copied_while_the_step_before_computes(world, tmp_path: Path):
    """The main stream is kept busy; meanwhile two steps are drawn and arrive by the side stream, pinned, bit-equal."""
    settings = config(tmp_path, engine="local", train__augment=0.3)
    source, again = batches(world, 0), batches(world, 0)
    expected = [prepare(next(again), settings, info(), world.device) for _ in range(5)][3:]
    with Prefetch(lambda: prepare(next(source), settings, info(), world.device), world.device) as ahead:
        for _ in range(3):
            ahead.start()
        first = [ahead.take() for _ in range(3)]
        torch.cuda.synchronize()
        del first  # kernels are loaded and both allocators have enough in stock: a new allocation would synchronize
        torch.cuda._sleep(int(5e9))  # clock cycles: more than a second
        ahead.start()
        ahead.start()
        for future in ahead._ahead:
            _, copied = future.result()
            copied.synchronize()
        assert not torch.cuda.current_stream().query(), "the copies waited for the computation"
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps = [ahead.take(), ahead.take()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for step, other in zip(steps, expected, strict=True):
        assert torch.equal(step.x0, other.x0)
        assert torch.equal(step.noise, other.noise)
        assert all(torch.equal(a, b) for a, b in zip(step.level, other.level, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(step.condition, other.condition, strict=True))


def test_memory_of_a_batch_in_use_is_not_given_to_the_next(world):
    """A kernel queued behind a long one reads the batch long after it was let go; later copies must not overwrite it."""
    size = 1 << 22
    values = iter(range(1, 100))

    def make() -> torch.Tensor:
        return torch.full((size,), float(next(values))).pin_memory().to(world.device, non_blocking=True)

    sums = []
    with Prefetch(make, world.device) as ahead:
        for _ in range(8):
            ahead.start()
            data = ahead.take()
            torch.cuda._sleep(int(1e8))
            sums.append(data.double().sum())
            del data
    assert [float(total) / size for total in sums] == list(range(1, 9))
