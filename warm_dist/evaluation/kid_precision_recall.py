"""Measures that need every feature vector, not only sums: KID, precision and recall."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.floating[Any]]
_BLOCK = 1024  # rows of a distance matrix at a time: 80 MB with 10,000 columns


def kid(fake: Rows, real: Rows) -> float:
    """Kernel inception distance: the unbiased estimate of MMD^2 with k(x, y) = (x·y / D + 1)^3, from all rows.

    fake, real: (N, D) and (M, D) features. Raises ValueError for fewer than two rows or different features.
    Source: Bińkowski et al. 2018 (arXiv 1801.01401), section 3, without random subsets, which only add variance.
    """
    _check(fake, real, 2)
    x, y = fake.astype(np.float64), real.astype(np.float64)
    return _mean_within(x) + _mean_within(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def precision_recall(fake: Rows, real: Rows, k: int = 3) -> tuple[float, float]:
    """The fraction of fakes within the real images' manifold, and of real images within the fakes'.

    fake, real: (N, D) and (M, D) features. A set's manifold is the union of balls around its members with the distance
    to the k-th nearest neighbour as radius. Raises ValueError for fewer than k + 1 rows or different features.
    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 1 and 2.
    """
    _check(fake, real, k + 1)
    centre = real.mean(axis=0, dtype=np.float64)  # less cancellation in |x|^2 - 2 x·y + |y|^2
    x, y = fake - centre, real - centre
    radius_x, radius_y = _squared_radii(x, k), _squared_radii(y, k)
    precise, recalled = np.zeros(len(x), bool), np.zeros(len(y), bool)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        squares = _squared_distances(x[rows], y)
        precise[rows] = (squares <= radius_y).any(axis=1)
        recalled |= (squares <= radius_x[rows, None]).any(axis=0)
    return float(precise.mean()), float(recalled.mean())


def _check(fake: Rows, real: Rows, needed: int) -> None:
    if fake.ndim != 2 or real.ndim != 2 or fake.shape[1] != real.shape[1] or min(len(fake), len(real)) < needed:
        raise ValueError(f"features {fake.shape} and {real.shape}: needs (N, D) and (M, D), N and M at least {needed}")


def _mean_within(x: NDArray[np.float64]) -> float:
    """Mean of the kernel over all pairs of different rows."""
    itself = ((np.einsum("nd,nd->n", x, x) / x.shape[1] + 1) ** 3).sum()
    return float((_kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1)))


def _kernel_sum(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Sum of the kernel over all pairs of a row of x and a row of y."""
    total = 0.0
    for start in range(0, len(x), _BLOCK):
        base = x[start : start + _BLOCK] @ y.T
        base /= x.shape[1]
        base += 1
        total += float((base * base * base).sum())  # ** 3 is ten times slower
    return total


def _squared_radii(x: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Squared distance of each row to its k-th nearest other row, (N,); each pair of blocks is computed once."""
    nearest = np.full((len(x), k), np.inf)
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(x), _BLOCK)]
    for number, a in enumerate(blocks):
        for b in blocks[number:]:
            squares = _squared_distances(x[a], x[b])
            if a == b:
                np.fill_diagonal(squares, np.inf)  # not the row itself
            else:
                nearest[b] = _smallest(np.hstack([nearest[b], squares.T]), k)
            nearest[a] = _smallest(np.hstack([nearest[a], squares]), k)
    out: NDArray[np.float64] = nearest.max(axis=1)
    return out


def _smallest(values: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    return np.partition(values, k - 1, axis=1)[:, :k]


def _squared_distances(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """|x|^2 - 2 x·y + |y|^2 for all pairs, (N, M); values below its rounding are 0, as equal rows must be."""
    scale = np.einsum("nd,nd->n", x, x)[:, None] + np.einsum("nd,nd->n", y, y)
    squares: NDArray[np.float64] = scale - 2 * (x @ y.T)
    # rounding grows with the square root of the number of terms; equal rows showed at most a tenth of this
    squares[squares <= 4 * x.shape[1] ** 0.5 * np.finfo(np.float64).eps * scale] = 0
    return squares
