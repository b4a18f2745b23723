"""Samplers: plain functions that carry x from the first level of a grid to its last. Source: docs mathematics, section 3.

Every function takes `denoise(x, level) -> Heads` and float64 state x (B, C, H, W); the grid is descending and may end
in 0, where the step is first order (A(0) = I). Calls of `denoise` are the NFE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from warm_dist.process import Path, level_at
from warm_dist.spectrum import blur, dct, eigenvalues, idct, unblurred
from warm_dist.types import DataInfo, Heads, Level

Denoise = Callable[[Tensor, Level], Heads]


def edm_grid(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """σ_i = (σ_max^{1/ρ} + i/(N−1) (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, i = 0 … N−1, without the final 0. Source: EDM, eq. 5."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(first + i / (num_steps - 1) * (last - first)) ** rho for i in range(num_steps)]


def sharpen(x: Tensor, alpha_now: float, alpha_next: float) -> Tensor:
    """(A(α_next) − A(α_now)) x for α_next <= α_now, without cancellation and without ever dividing by A."""
    drop = max(alpha_now**2 - alpha_next**2, 0.0) ** 0.5

    def one(value: float) -> Tensor:
        return torch.full((1,), value, dtype=torch.float64, device=x.device)

    return blur(unblurred(x, one(drop)), one(alpha_next))


def first_order(denoise: Denoise, x: Tensor, sigmas: Sequence[float], path: Path) -> Tensor:
    """x_s = x + (s − t)(x − b̂)/t + (A_s − A_t)(b̂ + R̂): an EDM Euler step and Cold Diffusion's Algorithm 2 in one.

    NFE = len(sigmas) − 1.
    """
    for t, s in pairwise(sigmas):
        now = denoise(x, level_at(t, path, x.device))
        x = x + (s - t) * (x - now.blurry) / t + sharpen(now.clean, path(t), path(s))
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], path: Path) -> Tensor:
    """Second order: the first-order step, then the mean of both ends' slopes in σ and in A.

    NFE = 2 (len(sigmas) − 1), less one when the grid ends in 0. At BNR 0 this is EDM's Algorithm 1.
    """
    for t, s in pairwise(sigmas):
        now = denoise(x, level_at(t, path, x.device))
        slope = (x - now.blurry) / t
        euler = x + (s - t) * slope + sharpen(now.clean, path(t), path(s))
        if s == 0:
            return euler
        then = denoise(euler, level_at(s, path, x.device))
        slope = (slope + (euler - then.blurry) / s) / 2
        x = x + (s - t) * slope + sharpen((now.clean + then.clean) / 2, path(t), path(s))
    return x


SAMPLERS = {"heun": heun, "first_order": first_order}


def nfe(method: str, num_steps: int) -> int:
    """Network evaluations of `num_steps` steps down to σ = 0."""
    return 2 * num_steps - 1 if method == "heun" else num_steps


def num_steps_for(method: str, evaluations: int) -> int | None:
    """The number of steps that costs exactly so many evaluations, or None (Heun's NFE is odd)."""
    num_steps = (evaluations + 1) // 2 if method == "heun" else evaluations
    return num_steps if nfe(method, num_steps) == evaluations and num_steps >= 2 else None


def start(noise: Tensor, sigma: float, alpha: float, info: DataInfo | None) -> Tensor:
    """The state at the first level from standard normals (B, C, H, W) float64.

    info None: the plain σ·noise [paper, EDM]. Otherwise per mode u ~ N(a m_k, a² Var_k + σ²) with the measured mean
    and spectrum of the data, channel means subtracted. Source: derived.
    """
    if info is None:
        return sigma * noise
    a = torch.exp(-eigenvalues(*noise.shape[-2:], device=noise.device) * alpha**2 / 2)
    centred = torch.tensor(info.mean_image - info.channel_mean[:, None, None]).to(noise)
    mean = dct(centred)
    spectrum = torch.tensor(info.power_spectrum).to(noise)
    variance = (spectrum - mean.square().mean(0)).clamp_min(0)
    return idct(a * mean + (a.square() * variance + sigma**2).sqrt() * dct(noise))
