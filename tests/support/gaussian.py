"""Gaussian data N(0, V S Vᵀ), on which every head and every step is known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from warm_dist.config.bnr import Path, as_path
from warm_dist.diffusion.heads import Heads
from warm_dist.diffusion.process import Level, Point, points
from warm_dist.diffusion.samplers import Sampler, edm_grid
from warm_dist.diffusion.spectrum import dct, eigenvalues, fallback_spectrum, idct


def gaussian_denoise(spectrum: Tensor) -> Callable[[Tensor, Level], Heads]:
    """The exact posterior means: x̂0 = aS/(a²S + σ²) u, b̂ = a x̂0, R̂ = (1 − a) x̂0."""
    lam = eigenvalues(*spectrum.shape)

    def denoise(x: Tensor, level: Level) -> Heads:
        exponent = -lam * level.alpha[:, None, None, None] ** 2 / 2
        a = torch.exp(exponent)
        u0 = a * spectrum / (a**2 * spectrum + level.sigma[:, None, None, None] ** 2) * dct(x)
        return Heads(idct(a * u0), idct(-torch.expm1(exponent) * u0))

    return denoise


def std_at(spectrum: Tensor, point: Point) -> Tensor:
    """The marginal's standard deviation per mode at one point."""
    a = torch.exp(-eigenvalues(*spectrum.shape) * point.alpha**2 / 2)
    return (a**2 * spectrum + point.sigma**2).sqrt()


def propagate(sampler: Sampler, spectrum: Tensor, path: Sequence[Point], std: Tensor) -> Tensor:
    """The std per mode, (H, W), at the end of the path from `std` at its start; exact, without drawing a number.

    Every step is linear per mode and every mode's noises are independent, so the variance is the sum over the start and
    each step's noise of the squared response to it alone.
    """
    denoise, asked = gaussian_denoise(spectrum), []
    first = idct(std[None, None])
    quiet = sampler(denoise, first, path, lambda step: asked.append(step) or torch.zeros_like(first))
    variance = dct(quiet)[0, 0].square()
    if asked:  # one image for the noise of each step
        unit = idct(torch.ones_like(first))

        def noise(step: int) -> Tensor:
            return torch.tensor([step == loud for loud in asked], dtype=torch.float64)[:, None, None, None] * unit

        variance += (
            dct(sampler(denoise, unit.new_zeros(len(asked), *unit.shape[1:]), path, noise))[:, 0].square().sum(0)
        )
    return variance.sqrt()


def pooled_error(sampler: Sampler, num_steps: int, bnr: float | Path, plain: bool = False, size: int = 32) -> float:
    """sqrt(Σ(std − std*)² / Σ std*²) over modes, after num_steps − 1 steps from σ = 80 to 0.002; no sampling noise."""
    spectrum = fallback_spectrum(size, size)
    path = points(as_path(bnr) if isinstance(bnr, float) else bnr, edm_grid(num_steps, 0.002, 80.0, 7.0))[:-1]
    start = torch.full_like(spectrum, 80.0) if plain else std_at(spectrum, path[0])
    std, exact = propagate(sampler, spectrum, path, start), std_at(spectrum, path[-1])
    return float(((std - exact).square().sum() / exact.square().sum()).sqrt())
