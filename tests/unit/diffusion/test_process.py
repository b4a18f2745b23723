"""The forward process: blur, then noise; its paths and its marginals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from warm_dist.config.bnr import Cold, ConstantBNR, LogUniformBNR, PowerBNR, UniformBNR
from warm_dist.config.run import ProcessConfig
from warm_dist.diffusion.process import (
    Level,
    Point,
    cold_points,
    corrupt,
    level_at,
    points,
    raised,
    training_level,
    transition,
)
from warm_dist.diffusion.spectrum import blur, dct, eigenvalues, idct


def levels(sigma: float, alpha: float) -> Level:
    return Level(torch.tensor([sigma], dtype=torch.float64), torch.tensor([alpha], dtype=torch.float64))


def test_corrupt_blurs_and_adds_noise():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    level = Level(torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64))
    x = corrupt(x0, level, noise)
    torch.testing.assert_close(x[0], x0[0] + 0.5 * noise[0])
    torch.testing.assert_close(x[1], blur(x0[1:], torch.tensor([1.0]))[0] + 2 * noise[1])
    with pytest.raises(ValueError, match="must be equal"):
        corrupt(x0, level, noise[:1])


def test_transition_keeps_the_marginal_exactly():
    # mean: A(later) x0; variance per mode: k² σ² + spread² = σ̂² — both from linearity, without sampling
    x0 = torch.randn(1, 1, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    now, later = levels(0.7, 0.4), levels(1.3, 1.1)
    zero = torch.zeros_like(x0)
    torch.testing.assert_close(transition(blur(x0, now.alpha), now, later, zero), blur(x0, later.alpha))
    ones = torch.ones(1, 1, 8, 6, dtype=torch.float64)
    kept = dct(transition(idct(0.7 * ones), now, later, zero))
    added = dct(transition(zero, now, later, idct(ones)))
    torch.testing.assert_close(kept.square() + added.square(), torch.full_like(ones, 1.3**2))
    k = torch.exp(-eigenvalues(8, 6) * (1.1**2 - 0.4**2) / 2)
    torch.testing.assert_close(kept[0, 0], 0.7 * k)


def test_transition_goes_forward_only():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    for later in (levels(0.9, 0.5), levels(1.1, 0.4)):  # less noise; less blur, which would take the root of a negative
        with pytest.raises(ValueError, match="forward transition"):
            transition(x, levels(1.0, 0.5), later, x)


def drawn(bnr: Any, n: int = 20000) -> tuple[Level, torch.Tensor]:
    rng = np.random.default_rng(0)
    normal, uniform = torch.from_numpy(rng.standard_normal(n)), torch.from_numpy(rng.random(n))
    return training_level(ProcessConfig(bnr=bnr), normal, uniform, 16), uniform


def test_training_levels_are_log_normal_on_the_path():
    level, _ = drawn(0.5)
    assert float(level.sigma.log().mean()) == pytest.approx(-1.2, abs=0.03)  # 3.5 standard errors
    assert float(level.sigma.log().std()) == pytest.approx(1.2, abs=0.03)
    torch.testing.assert_close(level.alpha, 0.5 * level.sigma)
    level, _ = drawn(PowerBNR(kind="power", bnr=0.5, exponent=0.5))
    torch.testing.assert_close(level.alpha, 0.5 * level.sigma**1.5)


def test_each_image_draws_its_own_bnr():
    level, uniform = drawn(UniformBNR(kind="uniform", low=0.5, high=2.0))
    torch.testing.assert_close(level.alpha / level.sigma, 0.5 + 1.5 * uniform)
    level, uniform = drawn(LogUniformBNR(kind="log_uniform", low=0.1, high=2.0))
    torch.testing.assert_close((level.alpha / level.sigma).log(), math.log(0.1) + math.log(20) * uniform)
    assert float(level.sigma.log().std()) == pytest.approx(1.2, abs=0.03)


def test_cold_levels_keep_sigma_and_draw_alpha():
    level, uniform = drawn(Cold(kind="cold"))
    assert torch.equal(level.sigma, torch.full_like(uniform, 0.02))
    torch.testing.assert_close(level.alpha.log(), math.log(0.1) + math.log(8 / 0.1) * uniform)  # W/2 = 8
    level, uniform = drawn(Cold(kind="cold", alpha_min=0.2, alpha_max=3.0))
    torch.testing.assert_close(level.alpha.log(), math.log(0.2) + math.log(3 / 0.2) * uniform)


def test_points_end_at_the_origin_and_churn_rises_along_the_path():
    path = ConstantBNR(bnr=0.5)
    assert points(path, [3.0, 1.0]) == [(3.0, 1.5), (1.0, 0.5), (0.0, 0.0)]
    assert raised(path, Point(3.0, 1.5), 1.2) == pytest.approx((3.6, 1.8))
    cold = Cold(kind="cold")
    assert cold_points(cold, [8.0, 0.1]) == [(0.02, 8.0), (0.02, 0.1), (0.0, 0.0)]
    assert raised(cold, Point(0.02, 4.0), 1.2) == pytest.approx((0.02, 4.8))
    level = level_at(Point(3.0, 1.5))
    assert (float(level.sigma), float(level.alpha)) == (3.0, 1.5)
