"""The training loss of both heads, in network units. Source: derived, docs mathematics, section 4."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from warm_dist.precond import Coefficients, Network, coefficients, evaluate
from warm_dist.process import expand
from warm_dist.spectrum import blur, exact_float32, unblurred
from warm_dist.types import Level


class Loss(NamedTuple):
    """Mean squared error per pixel in network units, (B,) float32 each; `total` carries the residual's weight."""

    blurry: Tensor
    residual: Tensor
    total: Tensor


def targets(x0: Tensor, level: Level, noise: Tensor, c: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """(x, T_b, T_R): the corrupted input and what the raw heads must return; T_R is 0 where α is 0.

    T_b = (A x0 − c_skip,b x)/c_out,b is written as ((σ/s_b) A x0 − s_b ε)/√v, which does not cancel at small σ.
    """
    with exact_float32():
        blurry = blur(x0, level.alpha)
        x = blurry + expand(level.sigma, x0) * noise
        t_b = expand(level.sigma / (c.s_b * c.v.sqrt()), x0) * blurry - expand(c.s_b * c.c_in, x0) * noise
        seen = c.c_out_r > 0
        scale = torch.where(seen, 1 / torch.where(seen, c.c_out_r, 1.0), 0.0)  # masked before the division
        residual = unblurred(x0, level.alpha)
        t_r = expand(scale, x0) * residual - expand(scale * c.c_skip_r, x0) * x
    return x, t_b, t_r


def loss(
    network: Network,
    spectrum: Tensor,
    x0: Tensor,
    level: Level,
    noise: Tensor,
    labels: Tensor | None = None,
    residual_weight: str = "one",
) -> Loss:
    """|F_b − T_b|² + w_R |F_R − T_R|², mean per pixel.

    x0, noise: (B, C, H, W) float32, x0 centred by the channel means. level: (B,) float64 each. spectrum: (H, W) float64.
    residual_weight: "one", w_R = 1; "balanced", w_R = min(1, c_out,R²/c_out,b²). w_R = 0 where α = 0.
    """
    c = coefficients(spectrum, level)
    x, t_b, t_r = targets(x0, level, noise, c)
    f_b, f_r = evaluate(network, x, c, labels)
    with exact_float32():
        blurry = (f_b - t_b).square().mean((1, 2, 3))
        seen = (c.c_out_r > 0).float()
        residual = (f_r - t_r).square().mean((1, 2, 3)) * seen
        weight = seen if residual_weight == "one" else (c.c_out_r / c.c_out_b).square().clamp_max(1).float()
        return Loss(blurry, residual, blurry + weight * residual)
