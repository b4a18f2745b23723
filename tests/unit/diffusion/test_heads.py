"""Preconditioning, the two heads and their loss against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.gaussian import gaussian_denoise
from tests.support.tiny_run import info
from warm_dist.diffusion import heads as two_heads
from warm_dist.diffusion import per_frequency
from warm_dist.diffusion.heads import (
    Coefficients,
    Heads,
    coefficients,
    data_spectrum,
    heads,
    inconsistency,
    level_inputs,
    loss,
    targets,
)
from warm_dist.diffusion.process import Level, corrupt
from warm_dist.diffusion.spectrum import blur, dct, eigenvalues, fallback_spectrum, idct, unblurred

SPECTRUM = fallback_spectrum(32, 32)


def level(*sigmas: float, bnr: float = 0.5) -> Level:
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    return Level(sigma, bnr * sigma)


def test_coefficients_at_bnr_half_and_sigma_one():
    """Fault: an output scale leaves out the data's power, or a skip scale uses the wrong moment."""
    c = coefficients(SPECTRUM, level(1.0))
    assert float(c.s_b**2) == pytest.approx(0.216666585, abs=5e-10)
    assert float(c.c_skip_r * c.v) == pytest.approx(0.0119799446, abs=5e-11)  # s_bR
    assert float(c.c_out_r**2 + (c.c_skip_r * c.v) ** 2 / c.v) == pytest.approx(0.00937352575, abs=5e-12)  # s_R²
    assert float(c.c_skip_b) == pytest.approx(0.178082137, abs=5e-10)
    assert float(c.c_out_b) == pytest.approx(0.421997792, abs=5e-10)
    assert float(c.c_skip_r) == pytest.approx(0.00984653046, abs=5e-12)
    assert float(c.c_out_r) == pytest.approx(0.0962058463, abs=5e-11)


def test_the_spectrum_is_the_measured_one_or_that_of_the_given_sigma_data():
    measured = info()
    assert torch.equal(data_spectrum(measured, "measured"), torch.full((8, 8), 0.25, dtype=torch.float64))
    assumed = data_spectrum(measured, 0.3)
    assert float(assumed.mean()) == pytest.approx(0.09)
    assert float(assumed[1, 0] / assumed[2, 0]) == pytest.approx(4)  # 1/f²


def test_residual_scale_needs_no_floor_at_small_sigma():
    """Fault: an epsilon is added to the residual's scale, or 1 − A is a subtraction in float32."""
    c = coefficients(SPECTRUM, level(0.002, 0.0002))
    limit = 0.25 * torch.tensor([0.002, 0.0002], dtype=torch.float64) ** 2 / 2 * 1.1273
    torch.testing.assert_close(c.c_out_r, limit, rtol=2e-4, atol=0)


def test_at_bnr_zero_the_denoiser_is_edms_and_the_residual_nothing():
    c = coefficients(SPECTRUM, level(0.002, 1.0, 80.0, bnr=0.0))
    sigma, data = torch.tensor([0.002, 1.0, 80.0], dtype=torch.float64), 0.5
    torch.testing.assert_close(c.c_skip_b, data**2 / (sigma**2 + data**2), rtol=1e-12, atol=0)
    torch.testing.assert_close(c.c_out_b, sigma * data / (sigma**2 + data**2).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(c.c_in, 1 / (sigma**2 + data**2).sqrt(), rtol=1e-12, atol=0)
    assert torch.equal(c.c_out_r, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(c.c_skip_r, torch.zeros(3, dtype=torch.float64))
    c_noise, c_blur = level_inputs(level(0.002, 1.0, 80.0, bnr=0.0), torch.zeros(3, 1, dtype=torch.float64))
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    assert torch.equal(c_blur, torch.zeros(3, dtype=torch.float64))


def test_the_network_is_told_the_blur_level_by_its_logarithm():
    """Weights that were trained with ln(1 + α²)/4 do not know another number."""
    _, c_blur = level_inputs(level(1.0, 80.0, bnr=2.0), torch.zeros(2, 1, dtype=torch.float64))
    assert c_blur.tolist() == pytest.approx([math.log(1 + 4) / 4, math.log(1 + 160**2) / 4], rel=1e-12)


def second_moments(sigma: float, bnr: float) -> tuple[float, float, float]:
    """E[(c_in x)²], E[T_b²], E[T_R²] per pixel, exactly: each is linear in x0 and ε, so power adds mode by mode."""
    at = level(sigma, bnr=bnr)
    c = coefficients(SPECTRUM, at)
    ones, zero = idct(torch.ones(1, 1, 32, 32, dtype=torch.float64)), torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    out = []
    from_data, from_noise = targets(ones, at, zero, c), targets(zero, at, ones, c)
    for data, noise, scale in zip(from_data, from_noise, (c.c_in, 1.0, 1.0), strict=True):
        power = (SPECTRUM * dct(data)[0, 0] ** 2 + dct(noise)[0, 0] ** 2).mean()
        out.append(float(power * scale**2))
    return out[0], out[1], out[2]


@pytest.mark.parametrize("bnr", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("sigma", [0.002, 0.05, 1.0, 20.0, 80.0])
def test_input_and_targets_have_unit_second_moment(sigma, bnr):
    assert second_moments(sigma, bnr) == pytest.approx((1.0, 1.0, 1.0), rel=1e-9)


def exact_network(at: Level):
    """The raw heads (F_b, F_R) of the exact posterior mean on Gaussian data."""
    c = coefficients(SPECTRUM, at)
    denoise = gaussian_denoise(SPECTRUM)

    def network(x, c_noise, c_blur):
        expand = lambda v: v[:, None, None, None]  # noqa: E731
        x = x.double() / expand(c.c_in)
        out = denoise(x, at)
        f_b = (out.blurry - expand(c.c_skip_b) * x) / expand(c.c_out_b)
        f_r = (out.residual - expand(c.c_skip_r) * x) / expand(c.c_out_r)
        return torch.cat([f_b, f_r], dim=1)

    return network


@pytest.mark.parametrize(
    ("sigma", "l_b", "l_r"), [(0.02, 0.9912, 0.0172), (1.0, 0.3026, 0.9946), (10.0, 0.7421, 0.9977)]
)
def test_loss_of_the_exact_gaussian_heads(sigma, l_b, l_r):
    """Fault: a wrong sign or scale in a target, so that exact heads have another loss than docs/mathematics.md says."""
    # the expectation, by passing every mode's data and noise once: error_k is linear in (x0_k, ε_k)
    at = level(sigma)
    network, zero = exact_network(at), torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    lam = eigenvalues(32, 32)
    a, c = torch.exp(-lam * at.alpha**2 / 2), coefficients(SPECTRUM, at)
    variance = SPECTRUM * sigma**2 / (a**2 * SPECTRUM + sigma**2)
    assert float((a**2 * variance).mean() / c.c_out_b**2) == pytest.approx(l_b, abs=6e-5)
    assert float(((1 - a) ** 2 * variance).mean() / c.c_out_r**2) == pytest.approx(l_r, abs=6e-5)
    # and what loss() computes is that, mode by mode
    for k in ((0, 0), (3, 5)):
        u = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
        u[0, 0][k] = 1.0
        data, noise = loss(network, SPECTRUM, idct(u), at, zero), loss(network, SPECTRUM, zero, at, idct(u))
        blurry = (SPECTRUM[k] * data.blurry + noise.blurry) * 32**2
        residual = (SPECTRUM[k] * data.residual + noise.residual) * 32**2
        assert float(blurry) == pytest.approx(float((a**2 * variance)[k] / c.c_out_b**2), rel=1e-9)
        assert float(residual) == pytest.approx(float(((1 - a) ** 2 * variance)[k] / c.c_out_r**2), rel=1e-9, abs=1e-15)


def test_heads_undo_the_preconditioning():
    at = level(1.0)
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, exact = heads(exact_network(at), SPECTRUM, x, at), gaussian_denoise(SPECTRUM)(x, at)
    torch.testing.assert_close(ours.blurry, exact.blurry, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.residual, exact.residual, atol=1e-12, rtol=0)


def test_loss_targets_keep_their_digits_in_float32():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=generator) * s for s in (0.5, 1.0))
    at = level(0.002)
    c: Coefficients = coefficients(SPECTRUM, at)
    for exact, ours in zip(targets(x0, at, noise, c), targets(x0.float(), at, noise.float(), c), strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("weight", ["one", "balanced", "denoiser", "sampler"])
def test_without_blur_the_residual_head_gets_no_gradient_and_no_nan(weight):
    # dividing the loss by c_out,R² = 0 would make NaN here, in the value or, masked afterwards, in the gradient
    at = Level(torch.tensor([0.5, 0.5, 1e-4]).double(), torch.tensor([0.0, 0.25, 1e-8]).double())
    generator = torch.Generator().manual_seed(0)
    x0, noise, out = (torch.randn(3, c, 32, 32, generator=generator) for c in (1, 1, 2))
    out.requires_grad_()
    result = loss(lambda *inputs: out, SPECTRUM, x0, at, noise, residual_weight=weight)
    result.total.sum().backward()
    assert bool(torch.isfinite(result.total).all())
    assert bool(torch.isfinite(out.grad).all())
    assert not out.grad[0, 1].any()
    assert out.grad[1].abs().amax((1, 2)).gt(0).all()
    assert out.grad[2, 0].any()


@pytest.mark.parametrize(("name", "most"), [("denoiser", math.inf), ("balanced", 1.0)])
def test_the_residuals_weight_is_the_ratio_of_the_heads_scales(name, most):
    """Fault: "balanced" without its bound, or a weight of the scales in place of their squares."""
    at = level(0.01, 20.0)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 1, 32, 32, generator=generator) for _ in range(2))
    result = loss(lambda *inputs: torch.zeros(2, 2, 32, 32), SPECTRUM, x0, at, noise, residual_weight=name)
    c = coefficients(SPECTRUM, at)
    q = (c.c_out_r / c.c_out_b).square()
    assert q[0] < 0.01 < 1 < q[1]
    assert (result.residual > 0).all()
    torch.testing.assert_close(result.total, result.blurry + q.clamp_max(most).float() * result.residual)


def test_sampler_weight_is_the_gain_of_the_error_in_a_step():
    # an error e of R̂ alone changes dx/d ln σ at constant BNR by −α² Λ A e: its square, in units of c_out,b
    at, e = level(0.7), torch.randn(1, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c, zero = coefficients(SPECTRUM, at), torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    _, t_b, t_r = targets(zero, at, zero, c)

    def network(x, c_noise, c_blur):
        return torch.cat([t_b, t_r + e / c.c_out_r[:, None, None, None]], dim=1)

    weighted = loss(network, SPECTRUM, zero, at, zero, residual_weight="sampler").total
    step = 1e-6
    blurs = [torch.exp(-eigenvalues(32, 32) * (0.35 * (1 + k * step)) ** 2 / 2) for k in (-0.5, 0.5)]
    slope = (blurs[1] - blurs[0]) / step * dct(e)
    assert float(weighted) == pytest.approx(float((slope**2).mean() / c.c_out_b**2), rel=1e-6)


@pytest.mark.parametrize("module", [two_heads, per_frequency], ids=["two heads", "per frequency"])
def test_the_network_is_told_the_classes_and_the_augmentation(module):
    """Fault: training, or sampling, is without classes though the data have some."""
    at, x, condition, seen = level(1.0, 2.0), torch.randn(2, 1, 32, 32), (torch.tensor([3, -1]), torch.ones(2, 9)), []

    def network(x, c_noise, c_blur, *given):
        seen.append(given)
        return torch.cat([x] * (2 if module is two_heads else 1), dim=1)

    module.loss(network, SPECTRUM, x, at, x, condition)
    module.heads(network, SPECTRUM, x, at, condition)
    assert len(seen) == 2
    assert all(a is b for given in seen for a, b in zip(given, condition, strict=True))


def test_inconsistency_is_zero_for_one_image_and_one_for_a_lost_residual():
    x0, at = torch.randn(2, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), level(1.0, 3.0)
    blurry, residual = blur(x0, at.alpha), unblurred(x0, at.alpha)
    torch.testing.assert_close(inconsistency(Heads(blurry, residual), at), torch.zeros(2).double(), atol=1e-12, rtol=0)
    wrong = Heads(blurry, residual + 0.1 * blurry)  # A x̂0 = b̂ + 0.1 A b̂
    expected = 0.1 * blur(blurry, at.alpha).flatten(1).norm(dim=1) / blurry.flatten(1).norm(dim=1)
    torch.testing.assert_close(inconsistency(wrong, at), expected)


def test_a_loss_tells_the_inconsistency_of_its_own_heads_when_asked():
    """Fault: a diagnosis of the targets, which agree, or of unscaled outputs; one that is made and paid for unasked."""
    at = level(0.3, 3.0)
    x0, noise, out = (torch.randn(2, c, 32, 32, generator=torch.Generator().manual_seed(c)) for c in (3, 3, 6))
    x = corrupt(x0, at, noise)
    result = loss(lambda *inputs: out, SPECTRUM, x0, at, noise, diagnose=True)
    expected = inconsistency(heads(lambda *inputs: out, SPECTRUM, x, at), at)
    torch.testing.assert_close(result.inconsistency, expected)
    plain = loss(lambda *inputs: out, SPECTRUM, x0, at, noise)
    assert plain.inconsistency is None
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], result[:3], strict=True))


class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel: all but views."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view and operation is not torch.ops.aten._unsafe_view.default
        return operation(*args, **(kwargs or {}))


def test_the_loss_adds_few_launches_to_the_network_s():
    """On a GPU each costs some 7 µs of a step of 95 ms. Fault: blur matrices made twice, or a diagnosis unasked."""
    x0, out = torch.randn(2, 3, 32, 32), torch.randn(2, 6, 32, 32)
    targets(x0, level(1.0, 0.1), x0, coefficients(SPECTRUM, level(1.0, 0.1)))  # fills the caches
    with Launches() as launches:
        loss(lambda *inputs: out, SPECTRUM, x0, level(1.0, 0.1), x0)
    assert launches.count <= 92  # 88 with torch 2.14; 203 when everything was computed where it was used
