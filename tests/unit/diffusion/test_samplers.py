"""Samplers on Gaussian data with closed forms: errors, orders, starts, and evaluations counted."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.support.gaussian import gaussian_denoise, pooled_error, propagate, std_at
from warm_dist.config.bnr import Cold, ConstantBNR, PowerBNR, TableBNR
from warm_dist.config.run import SamplerConfig
from warm_dist.data import DataInfo
from warm_dist.diffusion.heads import Heads
from warm_dist.diffusion.process import ORIGIN, Point, cold_points, points, raised
from warm_dist.diffusion.samplers import (
    ancestral,
    churn,
    cold,
    cold_start,
    edm_grid,
    first_order,
    heun,
    log_linear_grid,
    multistep,
    nfe,
    num_steps_for,
    sampler_of,
    sharpen,
    start,
)
from warm_dist.diffusion.spectrum import blur, dct, eigenvalues, fallback_spectrum, idct
from warm_dist.errors import DataError

HALF = ConstantBNR(bnr=0.5)
DDIM, POSTERIOR = partial(ancestral, eta=0.0), partial(ancestral, eta=1.0)
CHURN_40 = partial(churn, raise_to=partial(raised, HALF), s_churn=40.0)
CURVED = PowerBNR(kind="power", bnr=0.5, exponent=-0.3, cap=1.5)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("sampler", "bnr", "known"),
    [
        (first_order, 0.5, ".285 .147 .0743 .0374"),
        (heun, 0.0, ".220 .0428 .0095 .0022"),
        (heun, 0.5, ".252 .0500 .0111 .0026"),
    ],
)
def test_error_on_gaussian_data(sampler, bnr, known):
    """Fault: Heun deblurs with the estimate at one end of its step only, which converges too, but slower."""
    for num_steps, value in zip((9, 18, 36, 72), known.split(), strict=True):  # to the digits given
        last_digit = 10.0 ** (1 - len(value))
        assert pooled_error(sampler, num_steps, bnr) == pytest.approx(float(value), abs=0.5 * last_digit)


@pytest.mark.parametrize(
    ("sampler", "num_steps", "known"),
    [(CHURN_40, 18, 0.1050), (CHURN_40, 36, 0.0355), (POSTERIOR, 18, 0.2421), (POSTERIOR, 36, 0.1341)],
)
def test_error_of_random_samplers_on_gaussian_data(sampler, num_steps, known):
    """Fault: a step of churn, or of the posterior, draws noise of the wrong size."""
    assert pooled_error(sampler, num_steps, 0.5) == pytest.approx(known, abs=6e-5)


@pytest.mark.parametrize(("bnr", "known"), [(0.0, 0.0418), (0.5, 0.0495)])
def test_error_from_the_plain_start(bnr, known):
    """Fault: that of test_error_on_gaussian_data, from the start that EDM uses, sigma times noise."""
    assert pooled_error(heun, 18, bnr, plain=True) == pytest.approx(known, abs=6e-5)


def test_multistep_is_four_times_as_exact_as_heun_at_equal_cost():
    for num_steps in (18, 36):
        ratio = pooled_error(heun, num_steps, 0.5) / pooled_error(multistep, 2 * num_steps, 0.5)
        assert 4 < ratio < 5


@pytest.mark.parametrize("bnr", [0.5, CURVED], ids=["constant", "power"])
@pytest.mark.parametrize(
    ("sampler", "expected"),
    [(first_order, 1.0), (DDIM, 1.0), (POSTERIOR, 1.0), (heun, 2.0), (multistep, 2.0)],
    ids=["first_order", "ddim", "posterior", "heun", "multistep"],
)
def test_order_of_convergence(sampler, expected, bnr):
    """Fault: a term of second order is lost, which a few coarse steps hide, or holds at constant BNR only."""
    coarse, fine = (pooled_error(sampler, n, bnr, size=12) for n in (64, 128))
    assert math.log2(coarse / fine) == pytest.approx(expected, abs=0.12)


def test_churn_is_of_second_order_when_its_random_share_is_kept():
    errors = []
    for num_steps in (64, 128):  # gamma falls with N as the steps do
        sampler = partial(churn, raise_to=partial(raised, HALF), s_churn=8.0)
        errors.append(pooled_error(sampler, num_steps, 0.5, size=12))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)], ids=["square", "rectangle"])
def test_every_path_ends_in_the_same_gaussian(size):
    """Fault: a step takes the BNR for constant, or mistakes height for width."""
    # on Gaussian data any path between two points carries one map: even the samples agree, not only the marginals
    spectrum = fallback_spectrum(*size)
    top, sigmas = Point(80.0, 40.0), edm_grid(300, 0.002, 80.0, 7.0)
    table = TableBNR(kind="table", sigma=(0.1, 1.0, 80.0), bnr=(0.0, 2.0, 0.5))
    x = idct(std_at(spectrum, top)[None, None])
    ends = [heun(gaussian_denoise(spectrum), x, points(path, sigmas)) for path in (HALF, table)]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-3 * float(ends[0].abs().max()))
    std = fallback_spectrum(*size).sqrt()
    torch.testing.assert_close(dct(ends[1])[0, 0], std, rtol=3e-3, atol=0)


@pytest.mark.parametrize(
    "sampler", [first_order, heun, multistep, DDIM, CHURN_40], ids=["first_order", "heun", "2m", "ddim", "churn"]
)
def test_rectangular_images_converge_too(sampler):
    spectrum = fallback_spectrum(6, 10)
    path = points(HALF, edm_grid(120, 0.002, 80.0, 7.0))[:-1]
    std = propagate(sampler, spectrum, path, std_at(spectrum, path[0]))
    torch.testing.assert_close(std, std_at(spectrum, path[-1]), rtol=0.08, atol=0)


def test_first_order_step_is_cold_diffusions_algorithm_2_plus_denoising():
    # with b̂ = x nothing is denoised: x − D(x̂0, t) + D(x̂0, s) remains
    x, clean = randn(1, 1, 8, 8), randn(1, 1, 8, 8, seed=1)
    path = points(ConstantBNR(bnr=0.7), [2.0, 1.0])[:-1]
    expected = x - blur(clean, torch.tensor([1.4])) + blur(clean, torch.tensor([0.7]))
    for sampler in (first_order, cold):
        torch.testing.assert_close(sampler(lambda x, level: Heads(x, clean - x), x, path), expected)


def test_on_the_cold_path_the_first_order_step_only_deblurs():
    clean = randn(1, 1, 8, 8, seed=1)
    denoise = lambda x, level: Heads(blur(clean, level.alpha), clean - blur(clean, level.alpha))  # noqa: E731
    path = cold_points(Cold(kind="cold"), log_linear_grid(9, 0.1, 4.0))
    noisy = blur(clean, torch.tensor([4.0])) + 0.02 * randn(1, 1, 8, 8)
    for sampler in (first_order, heun, multistep, DDIM):
        torch.testing.assert_close(sampler(denoise, noisy, path, lambda step: 0 * noisy), clean)
    torch.testing.assert_close(cold(denoise, noisy, path) - clean, noisy - blur(clean, torch.tensor([4.0])))


@pytest.mark.parametrize("sampler", [partial(churn, s_churn=4.0), POSTERIOR], ids=["churn", "posterior"])
def test_randomness_on_the_cold_path_acts_on_the_blur_and_restores_the_floor(sampler):
    spectrum, path_of = fallback_spectrum(8, 8), Cold(kind="cold")
    if sampler.func is churn:
        sampler = partial(sampler, raise_to=partial(raised, path_of))
    errors = []
    for num_steps in (60, 120):
        path = cold_points(path_of, log_linear_grid(num_steps, 0.1, 4.0))[:-1]
        std = propagate(sampler, spectrum, path, std_at(spectrum, path[0]))
        errors.append(float((std / std_at(spectrum, path[-1]) - 1).abs().max()))
    assert errors[1] < 0.12
    assert errors[1] < 0.6 * errors[0]  # at least of first order


def test_ddim_is_the_first_order_step_for_consistent_heads():
    spectrum = fallback_spectrum(8, 8)
    path, x = points(HALF, edm_grid(9, 0.002, 80.0, 7.0)), 80 * randn(1, 2, 8, 8)
    ours = DDIM(gaussian_denoise(spectrum), x, path, lambda step: x)
    torch.testing.assert_close(ours, first_order(gaussian_denoise(spectrum), x, path), rtol=1e-9, atol=1e-9)


def test_eta_one_is_the_posterior_of_the_forward_process():
    # q(u_s | u_t, x0) by Bayes from u_s ~ N(a_s x0, s²) and u_t | u_s ~ N(k u_s, t² − k² s²), written out per mode
    t, s = Point(2.0, 1.0), Point(1.2, 0.6)
    x0, x, fresh = randn(1, 1, 6, 8), randn(1, 1, 6, 8, seed=1), randn(1, 1, 6, 8, seed=2)
    lam = eigenvalues(6, 8)
    a_s, k = torch.exp(-lam * s.alpha**2 / 2), torch.exp(-lam * (t.alpha**2 - s.alpha**2) / 2)
    forward = t.sigma**2 - k**2 * s.sigma**2
    precision = 1 / s.sigma**2 + k**2 / forward
    mean = (a_s * dct(x0) / s.sigma**2 + k * dct(x) / forward) / precision
    expected = idct(mean + precision.rsqrt() * dct(fresh))
    ours = POSTERIOR(lambda x, level: Heads(x0, 0 * x0), x, [t, s], lambda step: fresh)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_what_a_step_keeps_and_what_it_draws_make_the_noise_of_the_next_level(eta):
    """With x̂0 = 0 the state is noise alone: its variance is s² in every mode, for every eta, of which ς² is fresh."""
    path, zero, ones = [Point(2.0, 1.0), Point(1.2, 0.6)], randn(1, 1, 6, 8) * 0, idct(torch.ones(1, 1, 6, 8).double())
    sampler = partial(ancestral, lambda x, level: Heads(zero, zero), path=path, eta=eta)
    kept, fresh = dct(sampler(2.0 * ones, noise=lambda step: zero)), dct(sampler(zero, noise=lambda step: ones))
    torch.testing.assert_close(kept.square() + fresh.square(), torch.full_like(kept, 1.2**2))
    k2 = torch.exp(-eigenvalues(6, 8) * (1.0**2 - 0.6**2))
    torch.testing.assert_close(fresh[0, 0].square(), eta**2 * 1.2**2 * (2.0**2 - k2 * 1.2**2) / 2.0**2)


def test_churn_alone_keeps_the_marginal():
    # heads that make the following step do nothing: only the noise is left to judge
    spectrum, path = fallback_spectrum(8, 10), points(HALF, [2.0, 2.0 * (1 - 1e-12)])[:-1]
    std = propagate(partial(churn, raise_to=lambda p, f: Point(p.sigma * f, p.alpha * f), s_churn=0.4),
                    spectrum, path, std_at(spectrum, path[0]))  # fmt: skip
    up = Point(2.8, 1.4)
    one_step = propagate(heun, spectrum, [up, path[0]], std_at(spectrum, up))
    torch.testing.assert_close(std, one_step, rtol=1e-9, atol=0)


def test_churn_acts_only_inside_its_window():
    path, calls = points(HALF, edm_grid(18, 0.002, 80.0, 7.0)), []
    noise = lambda step: calls.append(path[step].sigma) or torch.zeros(1, 1, 4, 4, dtype=torch.float64)  # noqa: E731
    sampler = partial(CHURN_40, s_min=0.05, s_max=50.0)
    sampler(gaussian_denoise(fallback_spectrum(4, 4)), randn(1, 1, 4, 4), path, noise)
    assert calls == [point.sigma for point in path if 0.05 <= point.sigma <= 50]


def test_churn_scales_its_noise_by_s_noise():
    path, ones = points(HALF, [2.0, 1.0])[:-1], idct(torch.ones(1, 1, 4, 4, dtype=torch.float64))
    added = [
        churn(lambda x, level: Heads(x, 0 * x), 0 * ones, path, lambda step: ones, partial(raised, HALF), 40.0,
              s_noise=scale) for scale in (1.0, 1.5)
    ]  # fmt: skip
    assert float(dct(added[0]).abs().min()) > 1
    torch.testing.assert_close(added[1], 1.5 * added[0])


@pytest.mark.parametrize("method", ["heun", "first_order", "multistep", "churn", "ancestral", "cold"])
def test_nfe_counts_the_calls(method):
    calls = []

    def denoise(x, level):
        calls.append(1)
        return Heads(x, torch.zeros_like(x))

    zero = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    path = points(HALF, edm_grid(18, 0.002, 80, 7))
    sampler_of(SamplerConfig(method=method), HALF)(denoise, zero, path, lambda step: zero)
    assert len(calls) == nfe(method, 18)
    assert num_steps_for(method, len(calls)) == 18
    assert num_steps_for("heun", 36) is None


def test_grids_end_where_they_should():
    for grid in (edm_grid(18, 0.002, 80, 7), log_linear_grid(18, 0.002, 80)):
        assert (grid[0], grid[-1]) == (pytest.approx(80), pytest.approx(0.002))
        assert sorted(grid, reverse=True) == grid
    ratios = [low / high for high, low in pairwise(log_linear_grid(18, 0.002, 80))]
    assert ratios == pytest.approx([ratios[0]] * 17)


def test_sharpen_is_the_difference_of_two_blurs():
    x = torch.randn(1, 1, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    difference = blur(x, torch.tensor([0.3])) - blur(x, torch.tensor([0.9]))
    torch.testing.assert_close(sharpen(x, 0.9, 0.3), difference)


def test_default_start_has_the_datas_mean_and_spectrum():
    rng = np.random.default_rng(0)
    mean_image, spectrum = rng.uniform(-0.2, 0.9, (2, 8, 8)), fallback_spectrum(8, 8) * 4
    channel_mean = mean_image.mean((1, 2))
    mean = dct(torch.from_numpy(mean_image - channel_mean[:, None, None]))
    info = DataInfo(8, 2, 0, 1, channel_mean, mean_image, spectrum.numpy(), 1.0, np.zeros(0), np.zeros(0), "")
    at = Point(2.0, 1.0)
    zero, ones = torch.zeros(1, 2, 8, 8, dtype=torch.float64), torch.ones(1, 2, 8, 8, dtype=torch.float64)
    a = torch.exp(-eigenvalues(8, 8) * 1.0**2 / 2)
    at_mean = dct(start(zero, at, info))[0]
    torch.testing.assert_close(at_mean, a * mean)
    std = dct(start(idct(ones), at, info))[0] - at_mean
    variance = (spectrum - mean.square().mean(0)).clamp_min(0)
    torch.testing.assert_close(std, (a**2 * variance + 4).sqrt().expand(2, 8, 8))
    torch.testing.assert_close(start(ones, at, None), 2 * ones)


def test_cold_start_has_the_low_modes_mean_and_covariance():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((32, 20))  # fewer images than modes: a singular covariance
    low_mean, covariance = rng.standard_normal(32), root @ root.T
    info = DataInfo(8, 2, 0, 1, np.zeros(2), np.zeros((2, 8, 8)), np.ones((8, 8)), 1.0, low_mean, covariance, "")
    at = Point(0.02, 4.0)
    zero, a = torch.zeros(33, 2, 8, 8, dtype=torch.float64), torch.exp(-eigenvalues(8, 8)[:4, :4] * 8)
    normals = torch.cat([torch.zeros(1, 32), torch.eye(32)]).double()
    u = dct(cold_start(zero, normals, at, info))
    assert float(u[..., 4:, :].abs().max()) < 1e-12
    assert float(u[..., 4:].abs().max()) < 1e-12
    mean, low = u[0, :, :4, :4], u[1:, :, :4, :4] - u[:1, :, :4, :4]
    torch.testing.assert_close(mean, a * torch.tensor(low_mean).reshape(2, 4, 4))
    ours = torch.einsum("nk,nl->kl", low.reshape(32, 32), low.reshape(32, 32))
    gain = a.expand(2, 4, 4).reshape(32)
    torch.testing.assert_close(ours, gain[:, None] * torch.tensor(covariance) * gain, rtol=1e-9, atol=1e-9)
    only_noise = cold_start(zero[:1] + 1, normals[:1], at, info) - cold_start(zero[:1], normals[:1], at, info)
    torch.testing.assert_close(only_noise, 0.02 * torch.ones_like(only_noise))
    with pytest.raises(DataError, match="lowest DCT modes"):
        cold_start(zero[:1], normals[:1], at, DataInfo(8, 3, *[0] * 6, np.zeros(3), np.zeros((3, 3)), ""))


@pytest.mark.parametrize("sampler", [heun, multistep, POSTERIOR, CHURN_40], ids=["heun", "2m", "posterior", "churn"])
def test_samples_of_a_finite_data_set_land_on_its_points(sampler):
    data = randn(4, 1, 4, 4) * 0.5

    def denoise(x, level):
        # the exact posterior: a softmax over the points
        blurred = blur(data, level.alpha)
        distance = (x[:, None] - blurred[None]).square().sum((2, 3, 4))
        weight = torch.softmax(-distance / (2 * level.sigma**2), dim=1)
        clean, blurry = ((weight[:, :, None, None, None] * p[None]).sum(1) for p in (data, blurred))
        return Heads(blurry, clean - blurry)

    generator = torch.Generator().manual_seed(1)

    def noise(step):
        return torch.randn(600, 1, 4, 4, dtype=torch.float64, generator=generator)

    out = sampler(denoise, 80 * noise(0), points(HALF, edm_grid(40, 0.002, 80, 7)), noise)
    nearest, which = (out[:, None] - data[None]).square().sum((2, 3, 4)).sqrt().min(1)
    # a few trajectories end between two points, which finite steps cannot resolve
    assert float((nearest < 1e-2).double().mean()) > 0.97
    share = torch.bincount(which, minlength=4) / 600
    assert float((share - 0.25).abs().max()) < 0.07  # 4 standard errors


def test_marginal_std_is_what_the_process_says():
    """Fault: `std_at` of tests/support, with which others compare, is not the process's standard deviation."""
    spectrum = fallback_spectrum(8, 8)
    a = torch.exp(-eigenvalues(8, 8) / 2)
    torch.testing.assert_close(std_at(spectrum, Point(2.0, 1.0)).square(), a**2 * spectrum + 4)
    torch.testing.assert_close(std_at(spectrum, ORIGIN).square(), spectrum)
