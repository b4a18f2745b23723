"""Blur and spectra by the cosine transform."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

from warm_dist.diffusion.spectrum import (
    blur,
    dct,
    eigenvalues,
    exact_float32,
    fallback_spectrum,
    idct,
    split,
    unblurred,
)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).to(dtype)


def test_dct_is_scipys_orthonormal_dct_and_inverts():
    x = random(2, 3, 8, 12)
    np.testing.assert_allclose(dct(x).numpy(), dctn(x.numpy(), norm="ortho", axes=(2, 3)), atol=1e-12)
    np.testing.assert_allclose(idct(dct(x)).numpy(), x.numpy(), atol=1e-12)


def test_eigenvalues_tell_rows_from_columns():
    lam = eigenvalues(8, 16)
    assert lam.shape == (8, 16)
    assert float(lam[3, 0]) == pytest.approx((math.pi * 3 / 8) ** 2, rel=1e-14)
    assert float(lam[0, 3]) == pytest.approx((math.pi * 3 / 16) ** 2, rel=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 5.0])
def test_matrix_blur_is_the_dct_multiplier_for_any_height_and_width(alpha):
    x = random(2, 3, 8, 12)
    direct = idct(torch.exp(-eigenvalues(8, 12) * alpha**2 / 2) * dct(x))
    np.testing.assert_allclose(
        blur(x, torch.full((2,), alpha, dtype=torch.float64)).numpy(), direct.numpy(), atol=1e-12
    )


@pytest.mark.parametrize(("alpha", "tolerance"), [(2.0, 1e-7), (4.0, 1e-7), (1.0, 1e-2)])
def test_blur_is_a_spatial_gaussian_from_two_pixels_on(alpha, tolerance):
    # at 1 pixel a sampled Gaussian aliases: 3.5e-3 apart, so equality there would mean the wrong kernel
    x = random(1, 1, 32, 32)
    spatial = gaussian_filter(x[0, 0].numpy(), alpha, mode="reflect", truncate=12)
    apart = np.abs(blur(x, torch.tensor([alpha]))[0, 0].numpy() - spatial).max()
    assert apart < tolerance
    assert alpha >= 2 or apart > 1e-4


def test_each_image_has_its_own_blur():
    x = random(3, 1, 8, 8)
    alphas = torch.tensor([0.0, 0.5, 2.0])
    together = blur(x, alphas)
    for index in range(3):
        np.testing.assert_allclose(
            together[index].numpy(), blur(x[index : index + 1], alphas[index : index + 1])[0].numpy()
        )
    np.testing.assert_allclose(together[0].numpy(), x[0].numpy(), atol=1e-13)


def test_wrong_number_of_levels_is_refused():
    with pytest.raises(ValueError, match="a blur level per image"):
        blur(random(3, 1, 8, 8), torch.ones(2))


@pytest.mark.parametrize("size", [(32, 32), (24, 32)])
@pytest.mark.parametrize("sigma", [0.002, 0.02, 1.0])
def test_residual_keeps_its_digits_in_float32(sigma, size):
    # x - A x in float32 errs by 7 % at sigma = 0.002, BNR 0.5
    x, alpha = random(1, 3, *size), torch.tensor([0.5 * sigma], dtype=torch.float64)
    exact = idct(-torch.expm1(-eigenvalues(*size) * alpha**2 / 2) * dct(x))
    blurry, ours = split(x.float(), alpha)
    assert float((ours.double() - exact).norm() / exact.norm()) < 1e-5
    assert torch.equal(blurry, blur(x.float(), alpha))
    assert torch.equal(ours, unblurred(x.float(), alpha))


@pytest.mark.parametrize(("size", "c"), [(32, 0.239), (64, 0.209), (128, 0.186), (256, 0.168)])
def test_fallback_spectrum_has_the_stated_constants(size, c):
    spectrum, lam = fallback_spectrum(size, size), eigenvalues(size, size)
    assert float(spectrum.mean()) == pytest.approx(0.25, rel=1e-12)
    assert float(spectrum[3, 5] * lam[3, 5]) == pytest.approx(c, abs=5e-4)
    assert float(spectrum.sum() - spectrum[0, 0]) / size**2 == pytest.approx(0.19, rel=1e-12)
    torch.testing.assert_close(fallback_spectrum(size, size, sigma_data=0.25), spectrum / 4)


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_left_out_inside_and_then_as_it_was(allowed):
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        with exact_float32():
            assert not matmul.allow_tf32
        assert matmul.allow_tf32 == allowed
    finally:
        matmul.allow_tf32 = before


def test_blur_leaves_autocast():
    x = random(1, 1, 16, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert blur(x, torch.ones(1)).dtype == torch.float32
    torch.testing.assert_close(blur(x, torch.ones(1)).double(), blur(x.double(), torch.ones(1)), atol=1e-6, rtol=0)
