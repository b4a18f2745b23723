"""Spectral analysis: what must be denoised and deblurred at each frequency and level, from the data's power spectrum.

For Gaussian data of the same spectrum every number here is exact; for images it describes the best linear estimate.
Source: derived, docs/mathematics.md, section 5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from warm_dist.config.bnr import Path, TableBNR
from warm_dist.diffusion.spectrum import eigenvalues, fallback_spectrum

Array = NDArray[np.float64]
SIGMAS = np.geomspace(0.002, 80.0, 64)
"""The noise levels analysed by default: EDM's range."""


class Radial(NamedTuple):
    """A spectrum averaged over rings of the frequency plane, (rings,) each.

    frequency: mean √λ, radians per pixel, increasing. power: mean S. modes: their number.
    """

    frequency: Array
    power: Array
    modes: Array


class Shares(NamedTuple):
    """The minimum mean squared error per pixel at each level, split over the heads; any shape.

    total = denoiser + deblurrer + cross. hot: the total without blur at the same σ. residual_energy: the residual's
    share of the image's energy.
    """

    denoiser: Array
    deblurrer: Array
    cross: Array
    total: Array
    hot: Array
    residual_energy: Array

    @property
    def price(self) -> Array:
        """Error relative to hot diffusion at the same σ; 1 at BNR 0."""
        return self.total / self.hot


def radial(spectrum: Array, num_rings: int | None = None) -> Radial:
    """Average a spectrum over rings of equal width in √λ up to the highest mode, without DC. spectrum: (H, W)."""
    frequency = np.sqrt(eigenvalues(*spectrum.shape).numpy()).ravel()[1:]
    power = spectrum.ravel()[1:]
    rings = num_rings or max(4, min(spectrum.shape) - 1)
    which = np.minimum((frequency / frequency.max() * rings).astype(int), rings - 1)
    count = np.bincount(which, minlength=rings).astype(np.float64)
    seen = count > 0
    means = [np.bincount(which, values, minlength=rings)[seen] / count[seen] for values in (frequency, power)]
    return Radial(means[0], means[1], count[seen])


def snr(spectrum: Array, sigma: float, alpha: float) -> Array:
    """Signal-to-noise ratio a²S/σ² per mode, (H, W)."""
    return _gain(spectrum, alpha) ** 2 * spectrum / sigma**2


def shares(spectrum: Array, path: Path, sigmas: Array = SIGMAS) -> Shares:
    """Each head's part of the error of the best estimate along a path, (len(sigmas),) each."""
    rows = []
    lam = eigenvalues(*spectrum.shape).numpy()
    for sigma, alpha in zip(sigmas, alphas(path, sigmas), strict=True):
        a, lost = _gain(spectrum, alpha), -np.expm1(-lam * alpha**2 / 2)
        variance = spectrum * sigma**2 / (a**2 * spectrum + sigma**2)
        rows.append(
            (
                (a**2 * variance).mean(),
                (lost**2 * variance).mean(),
                2 * (a * lost * variance).mean(),
                variance.mean(),
                (spectrum * sigma**2 / (spectrum + sigma**2)).mean(),
                (lost**2 * spectrum).sum() / spectrum.sum(),
            )
        )
    return Shares(*np.array(rows).T)


def alphas(path: Path, sigmas: Array) -> Array:
    """The path's α, pixels, at each σ."""
    return path.alpha(torch.from_numpy(np.asarray(sigmas, np.float64))).numpy()


def suggested_path(spectrum: Array, bnr: float = 0.5, num_rows: int = 16) -> TableBNR:
    """A path for this spectrum on which blur and noise balance as BNR `bnr` does on 1/f² data: S(1/α²) = κ σ².

    κ = bnr² C for the 1/f² spectrum C/λ with σ_data 0.5. S is the measured spectrum over √λ, made non-increasing by
    isotonic regression and continued as 1/λ at both ends. Returns BNR at `num_rows` σ from 0.002 to 80; α never falls.
    """
    from scipy.optimize import isotonic_regression

    natural = radial(fallback_spectrum(*spectrum.shape).numpy())
    kappa = bnr**2 * float(np.average(natural.power * natural.frequency**2, weights=natural.modes))
    measured = radial(spectrum)
    falling = isotonic_regression(np.log(np.maximum(measured.power, 1e-12)), weights=measured.modes, increasing=False).x
    # ln S over ln √λ, with the slope of 1/f² beyond both ends; a slight decrease everywhere makes the inverse unique
    x = np.log(measured.frequency)
    x = np.concatenate([[x[0] - 20], x, [x[-1] + 20]])
    y = np.concatenate([[falling[0] + 40], falling, [falling[-1] - 40]]) - 1e-9 * np.arange(len(x))
    sigmas = np.geomspace(0.002, 80.0, num_rows)
    alpha = np.exp(-np.interp(-np.log(kappa * sigmas**2), -y, x))
    return TableBNR(kind="table", sigma=tuple(_digits(sigmas)), bnr=tuple(_digits(alpha / sigmas)))


def suggested_bnr(path: Path, p_mean: float = -1.2, p_std: float = 1.2) -> float:
    """The path's geometric mean BNR over the training levels ln σ ~ N(p_mean, p_std²)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    sigmas = np.exp(p_mean + p_std * nodes)
    return float(np.exp(np.average(np.log(alphas(path, sigmas) / sigmas), weights=weights)))


def _gain(spectrum: Array, alpha: float) -> Array:
    return np.exp(-eigenvalues(*spectrum.shape).numpy() * alpha**2 / 2)


def _digits(values: Array) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
