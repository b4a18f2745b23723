"""One step of an engine against Adam's own formulas, and the shares of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.tiny_run import BATCH, config
from warm_dist.distributed.world import World
from warm_dist.training.engine import Engine, LocalEngine, clip_and_guard, total_norm

ALONE = World(0, 1, torch.device("cpu"), None)
BETA = 0.9  # of Adam's first moment, which after one step is (1 - BETA) times the gradient


class Product(nn.Module):
    """x times a weight (7,): its gradient can be told beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 8.0))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x * self.weight


def local(tmp_path: Path, world: World = ALONE, **train: Any) -> LocalEngine:
    changes = {f"train__{key}": value for key, value in train.items()}
    return LocalEngine(Product(), config(tmp_path, engine="local", **{"train__clip": None, **changes}), world)


X = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(0))
GRADIENT = X.mean(0) / 7  # of the mean of x times weight


def backward(engine: Engine, *parts: Tensor) -> None:
    zero = torch.zeros(())
    for part in parts:
        engine.backward(engine(part, zero, zero).mean())


def moment(engine: Engine) -> Tensor:
    return engine.fragments()[0].exp_avg


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    whole, parts = local(tmp_path), local(tmp_path, micro_batch_size=BATCH // 4)
    backward(whole, X)
    backward(parts, *X.chunk(4))
    assert float(parts.step(1e-3)) == pytest.approx(float(whole.step(1e-3)), rel=1e-6)
    torch.testing.assert_close(moment(parts), moment(whole))
    torch.testing.assert_close(moment(whole), (1 - BETA) * GRADIENT)


def test_a_step_takes_the_learning_rate_that_it_is_given(tmp_path):
    engine = local(tmp_path, eps=1e-12)
    before = engine.fragments()[0].master.clone()
    backward(engine, X)
    engine.step(0.02)
    torch.testing.assert_close(before - engine.fragments()[0].master, 0.02 * GRADIENT.sign(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("before", [0, 5])
def test_a_step_is_adam_s_and_its_count_goes_on_after_a_load(tmp_path, before):
    """Fault: betas, epsilon or the number of earlier steps, which corrects the moments, are not those of the run."""
    engine = local(tmp_path, betas=[0.8, 0.95], eps=0.01)
    fragment = engine.fragments()[0]
    engine.after_load(before)
    weight = fragment.master.clone()
    backward(engine, X)
    engine.step(0.02)
    mean = 0.2 * GRADIENT / (1 - 0.8 ** (before + 1))
    square = 0.05 * GRADIENT.square() / (1 - 0.95 ** (before + 1))
    torch.testing.assert_close(weight - fragment.master, 0.02 * mean / (square.sqrt() + 0.01), rtol=1e-3, atol=1e-6)


def test_gradients_do_not_stay_for_the_next_step(tmp_path):
    engine = local(tmp_path)
    for _ in range(2):
        backward(engine, X)
        engine.step(0.0)
    torch.testing.assert_close(moment(engine), (1 - BETA) * (1 + BETA) * GRADIENT)


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_clipping_shortens_the_whole_gradient_and_tells_its_true_norm(tmp_path, clip):
    engine = local(tmp_path, clip=clip)
    backward(engine, X)
    norm = float(engine.step(1e-3))
    assert norm == pytest.approx(float(GRADIENT.norm()), rel=1e-5)
    kept = min(1.0, clip / norm)
    torch.testing.assert_close(moment(engine), (1 - BETA) * kept * GRADIENT, rtol=1e-4, atol=0)


def test_a_sharded_gradient_is_clipped_by_the_norm_of_all_its_parts(tmp_path, monkeypatch):
    """Four ranks with equal parts: the sum of squares is four times, the norm twice a rank's own."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(4))
    engine = local(tmp_path)
    backward(engine, X)
    norm = float(clip_and_guard(engine.optimizer, engine.parameters, clip=0.01, sharded=True))
    assert norm == pytest.approx(2 * float(GRADIENT.norm()), rel=1e-5)
    torch.testing.assert_close(engine.parameters[0].grad, GRADIENT * 0.01 / norm, rtol=1e-4, atol=0)


def test_ranks_average_their_gradients(tmp_path, monkeypatch):
    """Three ranks with one gradient: their sum is three times that, their mean is it."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(3))
    engine = local(tmp_path, World(0, 3, torch.device("cpu"), None))
    backward(engine, X)
    engine.step(1e-3)
    torch.testing.assert_close(moment(engine), (1 - BETA) * GRADIENT)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_element_is_one_rank_s(tmp_path, size):
    """Seven elements: the last shares are shorter, or empty."""
    owned = [f for rank in range(size) for f in local(tmp_path, World(rank, size, ALONE.device, None)).shard()]
    assert [f.start for f in owned] == [sum(f.numel for f in owned[:k]) for k in range(len(owned))]
    assert torch.cat([f.master for f in owned]).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert all(f.numel == f.exp_avg.numel() == f.exp_avg_sq.numel() > 0 for f in owned)


@pytest.mark.parametrize("shapes", [[(5_000_000,)], [(3,), (1_000, 2_000), (200_001,)]])
def test_the_norm_of_large_gradients_is_exact(shapes):
    """Fault: squares added up one by one in float32 on a CPU, 1e-4 off at 5 M elements, as stage 1 has in one tensor."""
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, shape in enumerate(shapes)]
    exact = torch.cat([g.double().reshape(-1) for g in gradients]).norm()
    assert float(total_norm(gradients)) == pytest.approx(float(exact), rel=5e-7)
