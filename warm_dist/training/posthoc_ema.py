"""Post-hoc EMAs of any length, from snapshots of two power-function EMAs. Source: EDM2 (arXiv 2312.02696), section 3.2.

A power-function EMA has the profile p(τ) = (γ+1) τ^γ / t^(γ+1), 0 ≤ τ ≤ t, over the weights of time τ. The wanted
profile is approximated by a linear combination of the snapshots' profiles (least squares over τ); the same combination
of the snapshots is the wanted average. The updates integrate p over each step exactly (derived: their betas' product
telescopes), so the step size causes no error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from warm_dist.errors import ConfigError

Array = NDArray[np.float64]


def inner_products(t_a: Array, gamma_a: Array, t_b: Array, gamma_b: Array) -> Array:
    """∫ p_a p_b dτ for broadcast times and exponents.

    (γa+1)(γb+1) / (γa+γb+1) · s^(γ of the later) / t_later, with s = earlier/later, since the integrand is a power of τ
    up to the earlier time. Source: derived.
    """
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma_later = np.where(t_a > t_b, gamma_a, gamma_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    out: Array = scale * (earlier / later) ** gamma_later / later
    return out


def combination(times: Array, gammas: Array, time: float, gamma: float) -> Array:
    """Coefficients (n,) of the snapshots (times, gammas), (n,) each, that best approximate the profile (time, gamma).

    Their sum is 1, as an average's must be; without that condition four snapshots miss it by 1 %.
    Raises ConfigError if all snapshots are earlier than `time`.
    """
    last = float(times.max())
    if last < time:
        raise ConfigError(f"no snapshot at nimg {time:.0f} or later; the last is at {last:.0f}")
    times, unit = times / time, np.ones(1)
    gram = inner_products(times[:, None], gammas[:, None], times, gammas)
    target = inner_products(times, gammas, unit, unit * gamma)
    # normalized columns: profiles of early times are high and narrow
    size = np.sqrt(np.diag(gram))
    scaled = gram / np.outer(size, size)
    # least squares among the combinations whose sum is 1, by a Lagrange multiplier. Source: derived
    ones = size.min() / size
    bordered = np.block([[scaled, ones[:, None]], [ones[None], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(bordered, np.append(target / size, size.min()), rcond=1e-13)[0]
    out: Array = solution[:-1] / size
    return out


def mismatch(coefficients: Array, times: Array, gammas: Array, time: float, gamma: float) -> float:
    """Distance of the combined profile from the wanted one, relative to the latter's norm; 0 is exact."""
    unit = np.ones(1)
    times = times / time
    wanted = float(inner_products(unit, unit * gamma, unit, unit * gamma)[0])
    cross = coefficients @ inner_products(times, gammas, unit, unit * gamma)
    square = coefficients @ inner_products(times[:, None], gammas[:, None], times, gammas) @ coefficients
    square_distance = 1.0 - float(2 * cross - square) / wanted
    return float(np.sqrt(np.maximum(square_distance, 0.0)))
