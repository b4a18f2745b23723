"""Preconditioning of the two heads: inputs and both targets have unit second moment at every (α, σ).

Source: derived after EDM's table 1, for targets A x0 and (I − A) x0; docs/mathematics.md, section 4.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from warm_dist.data import DataInfo
from warm_dist.process import expand
from warm_dist.spectrum import blur, eigenvalues, exact_float32, fallback_spectrum, unblurred
from warm_dist.types import Heads, Level

Condition = tuple[Tensor | None, ...]
"""(class labels or None,) or (class labels or None, labels of the augmentation)."""


class Network(Protocol):
    """(B, C, H, W) scaled input, (B,) ln(σ)/4, (B,) ln(1 + α²)/4, then the condition's (B,) int64 labels or None and,
    if the network was trained with augmentation, (B, 9) labels of it → (B, 2C, H, W), with one head (B, C, H, W)."""

    def __call__(self, x: Tensor, c_noise: Tensor, c_blur: Tensor, *condition: Tensor | None) -> Tensor: ...


class Coefficients(NamedTuple):
    """All (B,) float64. b: denoiser head, r: deblurrer head; v = s_b² + σ² is the input's second moment."""

    v: Tensor
    s_b: Tensor
    c_in: Tensor
    c_skip_b: Tensor
    c_out_b: Tensor
    c_skip_r: Tensor
    c_out_r: Tensor


def coefficients(spectrum: Tensor, level: Level) -> Coefficients:
    """Skip, output and input scales at each image's (α, σ).

    spectrum: (H, W) float64, S_k = E[u0_k²]. At α = 0 the residual's scales are exactly 0 and the denoiser's are EDM's.
    """
    lam = eigenvalues(*spectrum.shape, device=spectrum.device)
    exponent = -lam * level.alpha[:, None, None].square() / 2
    a, lost = torch.exp(exponent), -torch.expm1(exponent)  # 1 - a without cancellation
    s_b2 = (a.square() * spectrum).mean((1, 2))
    s_br = (a * lost * spectrum).mean((1, 2))
    s_r2 = (lost.square() * spectrum).mean((1, 2))
    sigma, s_b, v = level.sigma, s_b2.sqrt(), s_b2 + level.sigma.square()
    return Coefficients(
        v=v,
        s_b=s_b,
        c_in=v.rsqrt(),
        c_skip_b=s_b2 / v,
        c_out_b=sigma * s_b * v.rsqrt(),
        c_skip_r=s_br / v,
        c_out_r=(s_r2 - s_br.square() / v).clamp_min(0).sqrt(),  # >= 0 by Cauchy-Schwarz; the clamp is for rounding
    )


def data_spectrum(info: DataInfo, sigma_data: str | float) -> Tensor:
    """The power spectrum to precondition with, (H, W) float64: measured, or 1/f² of the given sigma_data."""
    if sigma_data == "measured":
        return torch.tensor(info.power_spectrum, dtype=torch.float64)
    return fallback_spectrum(info.resolution, info.resolution, float(sigma_data))


def level_inputs(level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the network embeds: ln(σ)/4 and ln(1 + α²)/4, (B,) each, in the dtype of x."""
    both = level.sigma.log() / 4, torch.log1p(level.alpha.square()) / 4
    return both[0].to(x.dtype).expand(len(x)), both[1].to(x.dtype).expand(len(x))


def evaluate(
    network: Network, x: Tensor, level: Level, c: Coefficients, condition: Condition = ()
) -> tuple[Tensor, Tensor]:
    """The raw heads (F_b, F_R) of the network at scaled input, each (B, C, H, W) in the dtype of x."""
    out = network(expand(c.c_in, x) * x, *level_inputs(level, x), *condition)
    blurry, residual = out.to(x.dtype).chunk(2, dim=1)
    return blurry, residual


def assemble(f_b: Tensor, f_r: Tensor, x: Tensor, c: Coefficients) -> Heads:
    """b̂ = c_skip,b x + c_out,b F_b and R̂ = c_skip,R x + c_out,R F_R."""
    return Heads(
        expand(c.c_skip_b, x) * x + expand(c.c_out_b, x) * f_b,
        expand(c.c_skip_r, x) * x + expand(c.c_out_r, x) * f_r,
    )


def heads(network: Network, spectrum: Tensor, x: Tensor, level: Level, condition: Condition = ()) -> Heads:
    """Both estimates at level (B,) or (1,), in the dtype of x."""
    c = coefficients(spectrum, level)
    f_b, f_r = evaluate(network, x, level, c, condition)
    with exact_float32():
        return assemble(f_b, f_r, x, c)


def inconsistency(estimate: Heads, level: Level) -> Tensor:
    """|b̂ − A x̂0| / |b̂|, (B,): 0 when both heads describe one image. A diagnostic. Source: derived."""
    with exact_float32():
        # b̂ − A(b̂ + R̂) = (I − A) b̂ − A R̂, whose first part does not cancel
        gap = unblurred(estimate.blurry, level.alpha) - blur(estimate.residual, level.alpha)
        size, whole = (part.square().sum((1, 2, 3)) for part in (gap, estimate.blurry))
        return (size / whole).sqrt()
