import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.gaussian import gaussian_denoise, pooled_error, std_at
from warm_dist.process import constant_bnr
from warm_dist.sampler import edm_grid, first_order, heun, nfe, num_steps_for, sharpen, start
from warm_dist.spectrum import blur, dct, eigenvalues, fallback_spectrum, idct
from warm_dist.types import DataInfo, Heads


@pytest.mark.parametrize(
    ("sampler", "bnr", "known"),
    [
        (first_order, 0.5, (0.285, 0.147, 0.0743, 0.0374)),
        (heun, 0.0, (0.220, 0.0428, 0.0095, 0.0022)),
        (heun, 0.5, (0.252, 0.0500, 0.0111, 0.0026)),
    ],
)
def test_error_on_gaussian_data(sampler, bnr, known):
    for num_steps, value in zip((9, 18, 36, 72), known, strict=True):
        digits = 4 if value < 0.1 and sampler is heun else 3
        assert pooled_error(sampler, num_steps, bnr) == pytest.approx(value, abs=0.51 * 10.0**-digits + 0.002 * value)


@pytest.mark.parametrize(("bnr", "known"), [(0.0, 0.0418), (0.5, 0.0495)])
def test_error_from_the_plain_start(bnr, known):
    assert pooled_error(heun, 18, bnr, plain=True) == pytest.approx(known, abs=6e-5)


@pytest.mark.parametrize(("sampler", "expected"), [(first_order, 1.0), (heun, 2.0)])
def test_order_of_convergence(sampler, expected):
    errors = [pooled_error(sampler, n, 0.5) for n in (64, 128, 256)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(expected, abs=0.1)


def test_first_order_step_is_cold_diffusions_algorithm_2_plus_denoising():
    # with b̂ = x nothing is denoised: x − D(x̂0, t) + D(x̂0, s) remains
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = first_order(lambda x, level: Heads(x, clean - x), x, [2.0, 1.0], constant_bnr(0.7))
    torch.testing.assert_close(out, x - blur(clean, torch.tensor([1.4])) + blur(clean, torch.tensor([0.7])))


def test_heun_at_bnr_zero_is_edms_algorithm_1():
    spectrum = fallback_spectrum(8, 8)
    denoise = gaussian_denoise(spectrum)
    path, sigmas = constant_bnr(0.0), [*edm_grid(6, 0.002, 80, 7), 0.0]
    x = 80 * torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = heun(denoise, x, sigmas, path)
    from warm_dist.process import level_at

    for i, (t, s) in enumerate(pairwise(sigmas)):
        d = (x - denoise(x, level_at(t, path)).blurry) / t
        following = x + (s - t) * d
        if i < len(sigmas) - 2:
            d_prime = (following - denoise(following, level_at(s, path)).blurry) / s
            following = x + (s - t) * (d / 2 + d_prime / 2)
        x = following
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("method", "sampler"), [("heun", heun), ("first_order", first_order)])
def test_nfe_counts_the_calls(method, sampler):
    calls = []

    def denoise(x, level):
        calls.append(1)
        return Heads(x, torch.zeros_like(x))

    sampler(
        denoise, torch.zeros(1, 1, 4, 4, dtype=torch.float64), [*edm_grid(18, 0.002, 80, 7), 0.0], constant_bnr(0.5)
    )
    assert len(calls) == nfe(method, 18)
    assert num_steps_for(method, len(calls)) == 18
    assert num_steps_for("heun", 36) is None


def test_grid_ends_where_it_should():
    grid = edm_grid(18, 0.002, 80, 7)
    assert (grid[0], grid[-1]) == (pytest.approx(80), pytest.approx(0.002))
    assert sorted(grid, reverse=True) == grid


def test_sharpen_is_the_difference_of_two_blurs():
    x = torch.randn(1, 1, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    difference = blur(x, torch.tensor([0.3])) - blur(x, torch.tensor([0.9]))
    torch.testing.assert_close(sharpen(x, 0.9, 0.3), difference)


def test_default_start_has_the_datas_mean_and_spectrum():
    rng = np.random.default_rng(0)
    mean_image, spectrum = rng.uniform(-0.2, 0.9, (2, 8, 8)), fallback_spectrum(8, 8) * 4
    channel_mean = mean_image.mean((1, 2))
    mean = dct(torch.from_numpy(mean_image - channel_mean[:, None, None]))
    info = DataInfo(8, 2, 0, 1, channel_mean, mean_image, spectrum.numpy(), 1.0, "")
    zero, ones = torch.zeros(1, 2, 8, 8, dtype=torch.float64), torch.ones(1, 2, 8, 8, dtype=torch.float64)
    a = torch.exp(-eigenvalues(8, 8) * 1.0**2 / 2)
    at_mean = dct(start(zero, 2.0, 1.0, info))[0]
    torch.testing.assert_close(at_mean, a * mean)
    std = dct(start(idct(ones), 2.0, 1.0, info))[0] - at_mean
    variance = (spectrum - mean.square().mean(0)).clamp_min(0)
    torch.testing.assert_close(std, (a**2 * variance + 4).sqrt().expand(2, 8, 8))
    torch.testing.assert_close(start(ones, 2.0, 1.0, None), 2 * ones)


def test_samples_of_a_finite_data_set_land_on_its_points():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=generator) * 0.5
    bnr = 0.5

    def denoise(x, level):
        # the exact posterior: a softmax over the points
        blurred = blur(points, level.alpha)
        distance = (x[:, None] - blurred[None]).square().sum((2, 3, 4))
        weight = torch.softmax(-distance / (2 * level.sigma**2), dim=1)
        clean, blurry = ((weight[:, :, None, None, None] * p[None]).sum(1) for p in (points, blurred))
        return Heads(blurry, clean - blurry)

    sigmas = [*edm_grid(40, 0.002, 80, 7), 0.0]
    x = 80 * torch.randn(600, 1, 4, 4, dtype=torch.float64, generator=generator)
    out = heun(denoise, x, sigmas, constant_bnr(bnr))
    distance = (out[:, None] - points[None]).square().sum((2, 3, 4)).sqrt()
    nearest, which = distance.min(1)
    # a few trajectories end between two points, which finite steps cannot resolve
    assert float((nearest < 1e-2).double().mean()) > 0.97
    share = torch.bincount(which, minlength=4) / 600
    assert float((share - 0.25).abs().max()) < 0.07  # 4 standard errors


def test_marginal_std_is_what_the_process_says():
    spectrum = fallback_spectrum(8, 8)
    std = std_at(spectrum, 2.0, constant_bnr(0.5))
    a = torch.exp(-eigenvalues(8, 8) / 2)
    torch.testing.assert_close(std.square(), a**2 * spectrum + 4)
