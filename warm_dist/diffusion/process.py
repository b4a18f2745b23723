"""The forward process: levels, sampling paths, blur plus noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from warm_dist.config.bnr import Cold, LogUniformBNR, Path, UniformBNR, as_path
from warm_dist.config.run import ProcessConfig
from warm_dist.diffusion.spectrum import blur, dct, eigenvalues, idct


class Level(NamedTuple):
    """Noise and blur level of each image.

    sigma: (B,) noise standard deviation, data units. alpha: (B,) standard deviation of the Gaussian blur, pixels.
    """

    sigma: Tensor
    alpha: Tensor


class Point(NamedTuple):
    """One point of a sampling path: noise std σ (data units) and blur std α (pixels)."""

    sigma: float
    alpha: float


ORIGIN = Point(0.0, 0.0)


def points(path: Path, sigmas: Sequence[float]) -> list[Point]:
    """The path's points at each σ, followed by the clean image's (0, 0)."""
    alphas = path.alpha(torch.tensor(sigmas, dtype=torch.float64)).tolist()
    return [*(Point(sigma, alpha) for sigma, alpha in zip(sigmas, alphas, strict=True)), ORIGIN]


def cold_points(cold: Cold, alphas: Sequence[float]) -> list[Point]:
    """The cold path's points: σ at its floor while α falls, then (0, 0)."""
    return [*(Point(cold.sigma, alpha) for alpha in alphas), ORIGIN]


def raised(path: Path | Cold, point: Point, factor: float) -> Point:
    """A noisier, blurrier point of the path for churn: at σ·factor; on the cold path at α·factor."""
    if isinstance(path, Cold):
        return Point(point.sigma, point.alpha * factor)
    return points(path, [point.sigma * factor])[0]


def level_at(point: Point, device: torch.device | None = None) -> Level:
    """The level of one point, (1,) float64 each, to broadcast over a batch."""
    return Level(*(torch.full((1,), value, dtype=torch.float64, device=device) for value in point))


def training_level(process: ProcessConfig, normal: Tensor, uniform: Tensor, width: int) -> Level:
    """Each image's training level: ln σ = P_mean + P_std·n, α by the config's BNR; cold: σ at its floor, ln α uniform.

    normal, uniform: (B,), standard normal and in [0, 1). width: image width, pixels. Returns (B,) float64 each.
    Source: σ, EDM, table 1; random BNR derived, docs/mathematics.md, section 1.
    """
    bnr, uniform = process.bnr, uniform.double()
    if isinstance(bnr, Cold):
        return Level(torch.full_like(uniform, bnr.sigma), bnr.draw(uniform, width))
    sigma = torch.exp(process.p_mean + process.p_std * normal.double())
    if isinstance(bnr, UniformBNR | LogUniformBNR):
        return Level(sigma, bnr.draw(uniform) * sigma)
    return Level(sigma, as_path(bnr).alpha(sigma))


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) or (1,) → (B, 1, 1, 1) in the dtype of `like`, ready to scale images."""
    return values.to(like.dtype)[:, None, None, None]


def corrupt(x0: Tensor, level: Level, noise: Tensor) -> Tensor:
    """Blur, then add noise: x = A(α) x0 + σ·noise.

    x0, noise: (B, C, H, W). level.sigma: (B,) noise std, data units; level.alpha: (B,) Gaussian std, pixels.
    Returns (B, C, H, W). Raises ValueError if the shapes differ. Source: Warm Diffusion, forward process.
    """
    if x0.shape != noise.shape:
        raise ValueError(f"x0 is {tuple(x0.shape)}, noise is {tuple(noise.shape)}: they must be equal")
    return blur(x0, level.alpha) + expand(level.sigma, x0) * noise


def transition(x: Tensor, now: Level, later: Level, noise: Tensor) -> Tensor:
    """The forward Markov step from `now` to a blurrier, noisier level; it keeps the marginal exactly.

    Per mode û = k u + sqrt(σ̂² − k² σ²) ε, k = exp(−λ(α̂² − α²)/2). x, noise: (B, C, H, W).
    Raises ValueError if σ or α falls. Source: derived (the family of arXiv 2209.05557).
    """
    if bool((later.sigma < now.sigma).any()) or bool((later.alpha < now.alpha).any()):
        raise ValueError("a forward transition needs later.sigma >= now.sigma and later.alpha >= now.alpha")
    lam = eigenvalues(x.shape[-2], x.shape[-1], x.device)
    drop = (later.alpha.square() - now.alpha.square())[:, None, None, None]
    k = torch.exp(-lam * drop / 2)
    spread = expand(later.sigma, k).square() - k.square() * expand(now.sigma, k).square()
    return idct(k.to(x.dtype) * dct(x) + spread.sqrt().to(x.dtype) * dct(noise))
