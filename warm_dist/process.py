"""The blur-noise forward process x = A(α) x0 + σ ε: levels, paths in the (α, σ) plane, marginals, transitions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from warm_dist.spectrum import blur, dct, eigenvalues, idct
from warm_dist.types import Level

Path = Callable[[float], float]
"""A sampling path: the blur std α (pixels) at noise std σ; non-decreasing in σ."""


def constant_bnr(bnr: float) -> Path:
    """α = BNR·σ, the scale-invariant path. BNR 0 is EDM. Source: Warm Diffusion (arXiv 2511.16904)."""
    return lambda sigma: bnr * sigma


def level_at(sigma: float, path: Path, device: torch.device | None = None) -> Level:
    """The path's level at one σ, (1,) float64 each: broadcasts over a batch."""
    return Level(*(torch.full((1,), value, dtype=torch.float64, device=device) for value in (sigma, path(sigma))))


def training_level(normal: Tensor, bnr: float, p_mean: float, p_std: float) -> Level:
    """ln σ = P_mean + P_std·n and α = BNR·σ from (B,) standard normals; (B,) float64. Source: EDM, table 1."""
    sigma = torch.exp(p_mean + p_std * normal.double())
    return Level(sigma, bnr * sigma)


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
    """The forward Markov step from `now` to a blurrier, noisier level, which keeps the marginal exactly.

    Per mode û = k u + sqrt(σ̂² − k² σ²) ε, k = exp(−λ(α̂² − α²)/2). x, noise: (B, C, H, W).
    Raises ValueError when σ or α falls. Source: derived (the family of arXiv 2209.05557).
    """
    if bool((later.sigma < now.sigma).any()) or bool((later.alpha < now.alpha).any()):
        raise ValueError("a forward transition needs later.sigma >= now.sigma and later.alpha >= now.alpha")
    lam = eigenvalues(x.shape[-2], x.shape[-1], x.device)
    drop = (later.alpha.square() - now.alpha.square())[:, None, None, None]
    k = torch.exp(-lam * drop / 2)
    spread = expand(later.sigma, k).square() - k.square() * expand(now.sigma, k).square()
    return idct(k.to(x.dtype) * dct(x) + spread.sqrt().to(x.dtype) * dct(noise))
