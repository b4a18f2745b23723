"""EMAs of any length after the fact, from snapshots of two power-function EMAs. Source: EDM2 (arXiv 2312.02696), 3.2.

A power-function EMA weighs the weights of time τ by p(τ) = (γ+1) τ^γ / t^(γ+1), 0 ≤ τ ≤ t. The wanted profile is
approximated by a linear combination of the snapshots' profiles, least squares over τ; the same combination of the
snapshots is then the wanted average. Our updates integrate p over each step exactly (derived: the product of their
betas telescopes), so that nothing is lost to the size of a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from warm_dist.errors import ConfigError


def inner_products(
    t_a: NDArray[np.float64], gamma_a: NDArray[np.float64], t_b: NDArray[np.float64], gamma_b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """∫ p_a p_b dτ for broadcast times and exponents: the integrand is a power of τ up to the earlier of both times.

    (γa+1)(γb+1) / (γa+γb+1) · s^(γ of the later) / t_later, with s = earlier/later. Derived.
    """
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma_later = np.where(t_a > t_b, gamma_a, gamma_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    out: NDArray[np.float64] = scale * (earlier / later) ** gamma_later / later
    return out


def combination(
    times: NDArray[np.float64], gammas: NDArray[np.float64], time: float, gamma: float
) -> NDArray[np.float64]:
    """Coefficients (n,) of the snapshots (times, gammas), (n,) each, that come nearest to the profile (time, gamma).

    Raises ConfigError if no snapshot is as late as `time`.
    """
    last = float(times.max())
    if last < time:
        raise ConfigError(f"no snapshot at nimg {time:.0f} or later; the last is at {last:.0f}")
    times, unit = times / time, np.ones(1)
    gram = inner_products(times[:, None], gammas[:, None], times, gammas)
    target = inner_products(times, gammas, unit, unit * gamma)
    # columns of size one: a profile of early times is high and narrow
    size = np.sqrt(np.diag(gram))
    scaled = gram / np.outer(size, size)
    out: NDArray[np.float64] = np.linalg.lstsq(scaled, target / size, rcond=1e-13)[0] / size
    return out


def mismatch(
    coefficients: NDArray[np.float64],
    times: NDArray[np.float64],
    gammas: NDArray[np.float64],
    time: float,
    gamma: float,
) -> float:
    """Distance of the combined profile from the wanted one, relative to the latter: 0 is perfect, 1 is nothing alike."""
    unit = np.ones(1)
    times = times / time
    wanted = float(inner_products(unit, unit * gamma, unit, unit * gamma)[0])
    cross = coefficients @ inner_products(times, gammas, unit, unit * gamma)
    square = coefficients @ inner_products(times[:, None], gammas[:, None], times, gammas) @ coefficients
    square_distance = 1.0 - float(2 * cross - square) / wanted
    return float(np.sqrt(np.maximum(square_distance, 0.0)))
