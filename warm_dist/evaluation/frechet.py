"""The Fréchet distance between two sets of images, and the fingerprint of how it was measured (FidSpec)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigvalsh
from scipy.linalg.lapack import dpstrf
from threadpoolctl import threadpool_limits

from warm_dist import rng

MEASURE = ("extractor", "extractor_sha256", "resize", "num_images", "kid_images", "reference")
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""inception-2015-12-05.pt as published with StyleGAN2-ADA; k-diffusion checks the same digest."""


@dataclass(frozen=True)
class FidSpec:
    """Everything that determines a Fréchet distance, and the KID, precision and recall measured with it.

    kid_images: images of either side for the latter three. reference: fingerprint of the real images. sampler: method,
    steps and schedule, as text. ema: which weights.
    """

    extractor: str
    extractor_sha256: str
    resize: str
    num_images: int
    kid_images: int
    reference: str
    sampler: str
    nfe: int
    ema: str
    seed: int

    @property
    def hash(self) -> str:
        """First 12 hex digits of the canonical JSON's sha256; equal specs give equal numbers."""
        return _digest(asdict(self))

    @property
    def measure(self) -> str:
        """The hash of the fields MEASURE alone: only numbers with the same measure may be compared."""
        return _digest({name: getattr(self, name) for name in MEASURE})

    @property
    def name(self) -> str:
        """The number's name: "FID" only with Inception's published weights in float32."""
        if self.extractor == "inception" and self.extractor_sha256 == INCEPTION_SHA256:
            return "FID"
        ours = self.extractor in ("lite0", "pixels")  # the others' weights are the user's
        return f"Fréchet distance ({self.extractor}{'' if ours else f' {self.extractor_sha256[:12]}'})"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Moments:
    """Mean and covariance of features, kept as sums over batches and ranks.

    n: number of rows. total: (D,), outer: (D, D), float64: the sums of x and of x x'.
    """

    n: int
    total: NDArray[np.float64]
    outer: NDArray[np.float64]

    @classmethod
    def zeros(cls, num_features: int) -> Moments:
        """The moments of no rows."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    @classmethod
    def of(cls, rows: NDArray[np.floating[Any]]) -> Moments:
        """The moments of features (N, D). Raises ValueError for another shape."""
        out = cls.zeros(rows.shape[-1])
        out.add(rows)
        return out

    @classmethod
    def from_flat(cls, vector: NDArray[np.float64]) -> Moments:
        """The inverse of `flat`. Raises ValueError for a length that is not 1 + D + D^2."""
        dim = int((vector.size - 1) ** 0.5)
        if vector.size != 1 + dim + dim**2:
            raise ValueError(f"{vector.size} numbers, needs 1 + D + D^2 as from `flat`")
        return cls(round(float(vector[0])), vector[1 : 1 + dim].copy(), vector[1 + dim :].reshape(dim, dim).copy())

    def flat(self) -> NDArray[np.float64]:
        """[n, total, outer] as one vector (1 + D + D^2,), to sum over ranks by one all-reduce."""
        return np.concatenate([[self.n], self.total, self.outer.ravel()])

    def add(self, rows: NDArray[np.floating[Any]]) -> None:
        """Add features (N, D), summed in float64. Raises ValueError for another shape."""
        if rows.ndim != 2 or rows.shape[1:] != self.total.shape:
            raise ValueError(f"rows: {rows.shape}, needs (N, {len(self.total)})")
        rows = rows.astype(np.float64)
        self.n += len(rows)
        self.total += rows.sum(axis=0)
        self.outer += rows.T @ rows

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of the features, (D,)."""
        return self.total / self.n

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased covariance (divided by n - 1) of the features, (D, D), as in clean-fid."""
        out: NDArray[np.float64] = (self.outer - np.outer(self.total, self.mean)) / (self.n - 1)
        return out


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the squared 2-Wasserstein distance of two Gaussians.

    The last trace is the sum of the square roots of the eigenvalues of L' B L, with A = L L' by pivoted Cholesky: a
    symmetric problem of A's rank, in a third of the time of the singular values of L_A' L_B. Roots magnify the rounding
    of zero eigenvalues (1e-16 becomes 1e-8), of which there may be a thousand, so L is taken of the set with fewer
    images: with fewer images than features its rank is the lower one, and L' B L has no zero eigenvalues.
    Raises ValueError for fewer than two images or different features.
    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6; Dowson and Landau 1982.
    """
    if min(a.n, b.n) < 2 or a.total.shape != b.total.shape:
        raise ValueError(
            f"{a.n} and {b.n} images with {a.total.shape} and {b.total.shape} features: needs 2 and equal shapes"
        )
    few, many = (a, b) if a.n <= b.n else (b, a)
    cov, other = few.covariance, many.covariance
    difference = few.mean - many.mean
    traces = np.trace(cov) + np.trace(other)
    with threadpool_limits(1, "blas"):  # waiting threads spin: two took 2.0 CPU-s, one 1.4
        factor = _factor(cov)
        squares = eigvalsh(factor.T @ other @ factor, overwrite_a=True)
    return float(difference @ difference + traces - 2 * np.sqrt(np.maximum(squares, 0)).sum())


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """L, (D, rank), with L L' = covariance; stops at pivots below D * eps * the largest, which are rounding."""
    lower, order, rank, _ = dpstrf(covariance, lower=1)
    out = np.empty((len(covariance), rank))
    out[order - 1] = np.tril(lower)[:, :rank]
    return out


def floor_parts(num_real: int, n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two disjoint random parts of the real images, whose distance is about that of n images of a perfect model.

    Returns positions among the `num_real` real images: of m = min(n, num_real // 2), and of all the others, since the
    score compares n images with all real ones. With fewer than 2n real images, both parts are smaller than the score's
    sets, and the floor is too high.
    """
    order = rng.generator(seed, "fid/floor").permutation(num_real)
    m = min(n, num_real // 2)
    return order[:m], order[m:]
