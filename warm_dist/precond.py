"""Preconditioning of the two heads: inputs and both targets have unit second moment at every (α, σ).

Source: derived after EDM's table 1, for targets A x0 and (I − A) x0; docs mathematics, section 4.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from warm_dist.process import expand
from warm_dist.spectrum import eigenvalues, exact_float32, fallback_spectrum
from warm_dist.types import DataInfo, Heads, Level


class Network(Protocol):
    """(B, C, H, W) scaled input, (B,) ln(σ)/4, (B,) ln(1 + α²)/4, (B,) int64 labels or None → (B, 2C, H, W)."""

    def __call__(self, x: Tensor, c_noise: Tensor, c_blur: Tensor, labels: Tensor | None) -> Tensor: ...


class Coefficients(NamedTuple):
    """All (B,) float64. b: denoiser head, r: deblurrer head; v = s_b² + σ² is the input's second moment."""

    v: Tensor
    s_b: Tensor
    c_in: Tensor
    c_noise: Tensor
    c_blur: Tensor
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
        c_noise=sigma.log() / 4,
        c_blur=torch.log1p(level.alpha.square()) / 4,
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


def evaluate(network: Network, x: Tensor, c: Coefficients, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The raw heads (F_b, F_R) of the network at scaled input, each (B, C, H, W) float32."""
    batch = (x.shape[0],)
    out = network(
        (expand(c.c_in, x) * x).float(), c.c_noise.float().expand(batch), c.c_blur.float().expand(batch), labels
    )
    blurry, residual = out.float().chunk(2, dim=1)
    return blurry, residual


def heads(network: Network, spectrum: Tensor, x: Tensor, level: Level, labels: Tensor | None = None) -> Heads:
    """Both estimates at level (B,) or (1,): b̂ = c_skip,b x + c_out,b F_b, R̂ = c_skip,R x + c_out,R F_R; dtype of x."""
    c = coefficients(spectrum, level)
    f_b, f_r = evaluate(network, x, c, labels)
    with exact_float32():
        return Heads(
            expand(c.c_skip_b, x) * x + expand(c.c_out_b, x) * f_b.to(x.dtype),
            expand(c.c_skip_r, x) * x + expand(c.c_out_r, x) * f_r.to(x.dtype),
        )
