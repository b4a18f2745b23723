"""The training loss of both heads, in network units. Source: derived, docs/mathematics.md, section 4."""

from __future__ import annotations

import torch
from torch import Tensor

from warm_dist.precond import Coefficients, Condition, Network, assemble, coefficients, evaluate, inconsistency
from warm_dist.process import expand
from warm_dist.spectrum import blur, dct, eigenvalues, exact_float32, idct, unblurred
from warm_dist.types import Level, Loss


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
    condition: Condition = (),
    residual_weight: str = "one",
) -> Loss:
    """|F_b − T_b|² + w_R |F_R − T_R|², mean per pixel.

    x0, noise: (B, C, H, W) float32, x0 centred by the channel means. level: (B,) float64 each. spectrum: (H, W) float64.
    residual_weight, with q = c_out,R²/c_out,b²: "one", w_R = 1; "balanced", min(1, q); "denoiser", q, both errors then
    weigh 1/c_out,b² in data units; "sampler", q with the error first filtered by G = λα² e^{−λα²/2}, the gain with which
    it enters dx/d ln σ at constant BNR. w_R = 0 where α = 0.
    """
    c = coefficients(spectrum, level)
    x, t_b, t_r = targets(x0, level, noise, c)
    f_b, f_r = evaluate(network, x, level, c, condition)
    with exact_float32():
        seen = (c.c_out_r > 0).float()
        blurry = (f_b - t_b).square().mean((1, 2, 3))
        residual = weighted = (f_r - t_r).square().mean((1, 2, 3)) * seen
        if residual_weight == "sampler":
            weighted = _sampler_gain(f_r - t_r, level.alpha).square().mean((1, 2, 3)) * seen
        q = (c.c_out_r / c.c_out_b).square()
        weight = {"one": seen, "balanced": q.clamp_max(1).float()}.get(residual_weight, q.float())
        with torch.no_grad():
            gap = inconsistency(assemble(f_b, f_r, x, c), level).float()
        return Loss(blurry, residual, blurry + weight * weighted, gap)


def _sampler_gain(error: Tensor, alpha: Tensor) -> Tensor:
    exponent = eigenvalues(*error.shape[-2:], device=error.device) * alpha[:, None, None, None].square()
    return idct((exponent * torch.exp(-exponent / 2)).to(error.dtype) * dct(error))
