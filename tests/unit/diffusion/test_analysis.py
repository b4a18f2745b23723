"""The spectral analysis on spectra whose answers are known."""

import math

import numpy as np
import pytest

from warm_dist.config.bnr import ConstantBNR, PowerBNR
from warm_dist.diffusion.analysis import SIGMAS, radial, shares, snr, suggested_bnr, suggested_path
from warm_dist.diffusion.spectrum import eigenvalues, fallback_spectrum

NATURAL = fallback_spectrum(32, 32).numpy()


def test_one_mode_in_closed_form():
    """Fault: rows and columns are swapped, or one head's share is weighted by the other's gain."""
    spectrum = np.zeros((4, 6))
    spectrum[1, 2] = 3.0
    lam = (np.pi / 4) ** 2 + (2 * np.pi / 6) ** 2
    a = np.exp(-lam * 1.0**2 / 2)
    split = shares(spectrum, ConstantBNR(bnr=0.5), np.array([2.0]))
    p = 3 * 4 / (a**2 * 3 + 4) / 24  # mean over 24 modes
    assert split.total[0] == pytest.approx(p)
    assert split.denoiser[0] == pytest.approx(a**2 * p)
    assert split.deblurrer[0] == pytest.approx((1 - a) ** 2 * p)
    assert split.hot[0] == pytest.approx(3 * 4 / (3 + 4) / 24)
    assert split.residual_energy[0] == pytest.approx((1 - a) ** 2)
    assert snr(spectrum, 2.0, 1.0)[1, 2] == pytest.approx(a**2 * 3 / 4)


def test_shares_add_up_and_blur_has_its_price():
    """Fault: the cross term is left out or counted once, or the price compares two different sigmas."""
    before = np.ones(len(SIGMAS))
    for bnr in (0.0, 0.1, 0.5, 2.0):
        split = shares(NATURAL, ConstantBNR(bnr=bnr))
        np.testing.assert_allclose(split.denoiser + split.deblurrer + split.cross, split.total, rtol=1e-12)
        if bnr == 0:
            np.testing.assert_allclose(split.price, 1, rtol=1e-12)
        else:
            assert (split.price > before).all()
        before = split.price


def test_total_is_the_gaussian_loss_of_mathematics():
    """Fault: the analysis and the training loss disagree about what a given spectrum costs."""
    # at BNR 0.5, σ = 1: L_b = .3026 in units of c_out,b² = .421997792²
    split = shares(NATURAL, ConstantBNR(bnr=0.5), np.array([1.0]))
    assert split.denoiser[0] / 0.421997792**2 == pytest.approx(0.3026, abs=6e-5)


def test_radial_average_keeps_the_power():
    for shape in ((8, 8), (6, 10)):
        spectrum = fallback_spectrum(*shape).numpy()
        rings = radial(spectrum)
        assert rings.modes.sum() == spectrum.size - 1
        assert (rings.power * rings.modes).sum() == pytest.approx(spectrum.sum() - spectrum[0, 0])
        assert (np.diff(rings.frequency) > 0).all()
    flat = radial(1 / np.maximum(eigenvalues(32, 32).numpy(), 1e-9))
    assert flat.power * flat.frequency**2 == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.5), (4.0, 0.25), (0.25, 1.0)])
def test_suggestion_is_half_on_natural_spectra_and_falls_with_their_power(factor, expected):
    path = suggested_path(NATURAL * factor)
    assert suggested_bnr(path) == pytest.approx(expected, rel=0.01)
    assert path.bnr == pytest.approx([expected] * len(path.bnr), rel=0.06)


def test_suggested_path_follows_the_spectrum():
    # twice the power above 1 rad/px: less blur where the noise crosses there, the old blur elsewhere
    lam = eigenvalues(32, 32).numpy()
    path = suggested_path(NATURAL * np.where(lam > 1, 4.0, 1.0))
    assert path.bnr[0] == pytest.approx(0.25, rel=0.1)
    assert path.bnr[-1] == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("std", [0.5, 1.2])
def test_a_path_s_ratio_is_its_geometric_mean_over_the_training_levels(std):
    """At BNR min(σ, e^-1) the mean of ln BNR is that of a normal cut at -1, here at its centre: -1 - std φ(0)."""
    path = PowerBNR(kind="power", bnr=1.0, exponent=1.0, cap=math.exp(-1))
    assert math.log(suggested_bnr(path, -1.0, std)) == pytest.approx(
        -1 - std / math.sqrt(2 * math.pi), abs=0.03
    )  # a kink
