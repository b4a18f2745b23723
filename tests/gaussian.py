"""Gaussian data N(0, V S Vᵀ), on which every head and every step is known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from warm_dist.process import Path, constant_bnr
from warm_dist.sampler import edm_grid
from warm_dist.spectrum import dct, eigenvalues, fallback_spectrum, idct
from warm_dist.types import Heads, Level


def gaussian_denoise(spectrum: Tensor) -> Callable[[Tensor, Level], Heads]:
    """The exact posterior means: x̂0 = aS/(a²S + σ²) u, b̂ = a x̂0, R̂ = (1 − a) x̂0."""
    lam = eigenvalues(*spectrum.shape)

    def denoise(x: Tensor, level: Level) -> Heads:
        exponent = -lam * level.alpha[:, None, None, None] ** 2 / 2
        a = torch.exp(exponent)
        u0 = a * spectrum / (a**2 * spectrum + level.sigma[:, None, None, None] ** 2) * dct(x)
        return Heads(idct(a * u0), idct(-torch.expm1(exponent) * u0))

    return denoise


def std_at(spectrum: Tensor, sigma: float, path: Path) -> Tensor:
    """The marginal's standard deviation per mode at one level."""
    a = torch.exp(-eigenvalues(*spectrum.shape) * path(sigma) ** 2 / 2)
    return (a**2 * spectrum + sigma**2).sqrt()


def pooled_error(sampler: Callable[..., Tensor], num_steps: int, bnr: float, plain: bool = False) -> float:
    """sqrt(Σ(std − std*)² / Σ std*²) over modes, after num_steps − 1 steps from σ = 80 to 0.002; no sampling noise.

    Steps are linear per mode, so an image whose coefficients are the start's std becomes one that holds the final std.
    """
    spectrum = fallback_spectrum(32, 32)
    path = constant_bnr(bnr)
    grid = edm_grid(num_steps, 0.002, 80.0, 7.0)
    start = torch.full_like(spectrum, 80.0) if plain else std_at(spectrum, grid[0], path)
    end = sampler(gaussian_denoise(spectrum), idct(start[None, None]), grid, path)
    std, exact = dct(end)[0, 0], std_at(spectrum, grid[-1], path)
    return float(((std - exact).square().sum() / exact.square().sum()).sqrt())
