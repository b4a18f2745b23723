"""Averages against closed forms, and any length after the fact against the average tracked directly."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from warm_dist.distributed.world import World
from warm_dist.training import ema as ema_module
from warm_dist.training.ema import EMA, exponent_of, half_life, power
from warm_dist.training.engine import Fragment

ALONE = World(0, 1, torch.device("cpu"), None)


def run_ema(decay, values: list[float], batch: int) -> float:
    master = torch.tensor([values[0]])
    ema = EMA([Fragment("w", 0, master, master, master)], decay)
    for k, value in enumerate(values[1:], 1):
        master.fill_(value)
        ema.update(k * batch, batch)
    return float(ema.values[0])


def test_half_life_halves():
    assert half_life(1000, None, 5000, 1000) == 0.5
    assert half_life(1000, 0.05, 5000, 250) == 0.5  # the ramp: 5 % of what was seen
    assert run_ema(partial(half_life, 40, None), [1.0] + [0.0] * 10, 8) == pytest.approx(0.25)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.2])
def test_exponent_has_the_relative_width_that_was_asked_for(sigma_rel):
    gamma = exponent_of(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)  # moments of tau^gamma on [0, 1]
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)


def test_exponents_are_the_published_ones():
    # EDM2 (arXiv 2312.02696): sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94
    assert [exponent_of(s) for s in (0.05, 0.10)] == pytest.approx([16.97, 6.94], abs=5e-3)


def test_power_average_is_the_integral_of_its_profile():
    gamma, steps = exponent_of(0.1), 50
    values = np.random.default_rng(0).normal(size=steps + 1)
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    assert run_ema(partial(power, gamma), values.tolist(), 16) == pytest.approx(np.diff(edges) @ values[1:], rel=1e-5)


def test_a_whole_average_is_put_together_from_all_ranks(monkeypatch):
    """Rank 1 of two has the last two of four elements, rank 0 the others."""
    values = torch.tensor([3.0, 4.0])
    theirs = torch.tensor([1.0, 2.0, 0.0, 0.0])
    monkeypatch.setattr(ema_module.dist, "all_reduce", lambda flat: flat.add_(theirs))
    mine = EMA([Fragment("w", 2, *[values] * 3)], partial(half_life, 40, None))
    world = World(1, 2, torch.device("cpu"), None)
    assert mine.full(world, {"w": torch.Size([4])})["w"].tolist() == [1, 2, 3, 4]


def test_the_shares_of_a_parameter_are_put_where_they_lie():
    """Sampling needs it whole: the second half of a weight must not be taken for the first."""
    values = torch.arange(1.0, 7.0)
    shares = [Fragment("w", start, *[values[start:stop]] * 3) for start, stop in ((4, 6), (0, 4))]
    whole = EMA(shares, partial(half_life, 40, None)).full(ALONE, {"w": torch.Size([2, 3])})
    assert whole["w"].tolist() == [[1, 2, 3], [4, 5, 6]]
