"""The per-frequency sampler against closed forms."""

from __future__ import annotations

import pytest
import torch

from tests.support.gaussian import gaussian_denoise
from tests.support.tiny_run import config
from warm_dist.diffusion.per_frequency import heads, loss, loss_function, scales
from warm_dist.diffusion.process import Level, corrupt
from warm_dist.diffusion.spectrum import dct, eigenvalues, fallback_spectrum, idct

SPECTRUM = fallback_spectrum(8, 12)


def level(sigma: float, bnr: float = 0.5) -> Level:
    return Level(torch.tensor([sigma], dtype=torch.float64), torch.tensor([bnr * sigma], dtype=torch.float64))


def silent(x, c_noise, c_blur):
    return torch.zeros_like(x)


@pytest.mark.parametrize("sigma", [0.002, 1.0, 80.0])
@pytest.mark.parametrize("bnr", [0.0, 0.5, 2.0])
def test_input_and_target_have_unit_second_moment_in_every_mode(sigma, bnr):
    at = level(sigma, bnr)
    c = scales(SPECTRUM, at)
    a = torch.exp(-eigenvalues(8, 12) * at.alpha**2 / 2)
    one = torch.ones(1, 1, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(c.c_in**2 * (a**2 * SPECTRUM + sigma**2), one)
    torch.testing.assert_close(c.t_data**2 * SPECTRUM + c.t_noise**2, one)


def test_a_config_s_loss_is_its_preconditioning_s(tmp_path):
    assert loss_function(config(tmp_path, process__preconditioning="per_frequency")) is loss


def test_target_is_what_makes_the_heads_exact():
    # a network that returns the target gives back x0 itself
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, 2, 8, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    at = level(1.0)
    c = scales(SPECTRUM, at)
    target = idct(c.t_data * dct(x0) - c.t_noise * dct(noise))
    estimate = heads(lambda *inputs: target, SPECTRUM, corrupt(x0, at, noise), at)
    torch.testing.assert_close(estimate.clean, x0)
    result = loss(lambda *inputs: target, SPECTRUM, x0, at, noise)
    assert float(result.total) < 1e-20
    assert result.inconsistency is None
    assert loss(silent, SPECTRUM, x0, at, noise, diagnose=True).inconsistency.tolist() == [0.0]


def test_on_gaussian_data_the_right_answer_is_zero():
    x, at = torch.randn(1, 2, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), level(1.0)
    ours, exact = heads(silent, SPECTRUM, x, at), gaussian_denoise(SPECTRUM)(x, at)
    torch.testing.assert_close(ours.blurry, exact.blurry)
    torch.testing.assert_close(ours.residual, exact.residual)


def test_a_mode_without_power_costs_nothing():
    spectrum = SPECTRUM.clone()
    spectrum[3, 5] = 0.0
    mode = torch.zeros(1, 1, 8, 12, dtype=torch.float64)
    mode[..., 3, 5] = 1.0
    result = loss(silent, spectrum, 0 * mode, level(1.0), idct(mode))
    assert float(result.total) < 1e-30
