import numpy as np
import pytest
import torch

from warm_dist.process import constant_bnr, corrupt, level_at, training_level, transition
from warm_dist.spectrum import blur, dct, eigenvalues, idct
from warm_dist.types import Level


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
    with pytest.raises(ValueError, match="forward transition"):
        transition(x, levels(1.0, 0.5), levels(0.9, 0.5), x)


def test_training_levels_are_log_normal_on_the_path():
    normal = torch.from_numpy(np.random.default_rng(0).standard_normal(20000))
    level = training_level(normal, 0.5, -1.2, 1.2)
    assert float(level.sigma.log().mean()) == pytest.approx(-1.2, abs=0.03)  # 3.5 standard errors
    assert float(level.sigma.log().std()) == pytest.approx(1.2, abs=0.03)
    torch.testing.assert_close(level.alpha, 0.5 * level.sigma)


def test_path_and_level():
    level = level_at(3.0, constant_bnr(0.5))
    assert (float(level.sigma), float(level.alpha)) == (3.0, 1.5)
