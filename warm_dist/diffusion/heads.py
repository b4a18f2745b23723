"""The two heads: preconditioning, estimates and training loss.

Source: derived, following EDM's table 1 for the targets A x0 and (I − A) x0; docs/mathematics.md, section 4.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from warm_dist.data import DataInfo
from warm_dist.diffusion.process import Level, expand
from warm_dist.diffusion.spectrum import (
    blur,
    dct,
    eigenvalues,
    exact_float32,
    fallback_spectrum,
    idct,
    split,
    unblurred,
)


class Heads(NamedTuple):
    """The network's two estimates: the denoised, still blurry image E[A x0 | x] and the residual E[(I - A) x0 | x].

    Both (B, C, H, W), data units.
    """

    blurry: Tensor
    residual: Tensor

    @property
    def clean(self) -> Tensor:
        """The estimate of x0, (B, C, H, W): the sum of both heads."""
        return self.blurry + self.residual


class Loss(NamedTuple):
    """Mean squared error per pixel in network units, (B,) float32 each; `total` weights the residual's.

    inconsistency: |b̂ − A x̂0| / |b̂|, how far the heads are from describing one image; no gradient; None unless asked.
    """

    blurry: Tensor
    residual: Tensor
    total: Tensor
    inconsistency: Tensor | None


Condition = tuple[Tensor | None, ...]
"""(class labels or None,) or (class labels or None, augmentation labels)."""


class Network(Protocol):
    """A network as preconditioning calls it; returns (B, 2C, H, W), or (B, C, H, W) with one head.

    x: (B, C, H, W), scaled. c_noise: (B,) ln(σ)/4. c_blur: (B,) ln(1 + α²)/4. condition: (B,) int64 class labels or
    None, then (B, 9) augmentation labels if the network was trained with augmentation.
    """

    def __call__(self, x: Tensor, c_noise: Tensor, c_blur: Tensor, *condition: Tensor | None) -> Tensor: ...


class Coefficients(NamedTuple):
    """Scales of a batch, (B,) float64 each. b: denoiser, r: deblurrer. v = s_b² + σ²: the input's second moment."""

    v: Tensor
    s_b: Tensor
    c_in: Tensor
    c_skip_b: Tensor
    c_out_b: Tensor
    c_skip_r: Tensor
    c_out_r: Tensor


def coefficients(spectrum: Tensor, level: Level) -> Coefficients:
    """The input, skip and output scales at each image's (α, σ).

    spectrum: (H, W) float64, S_k = E[u0_k²]. At α = 0 the residual's scales are exactly 0 and the denoiser's are EDM's.
    """
    lam = eigenvalues(*spectrum.shape, device=spectrum.device)
    exponent = lam * (level.alpha.square() / -2)[:, None, None]
    a, lost = torch.exp(exponent), -torch.expm1(exponent)  # 1 - a without cancellation
    s_b2 = (a.square() * spectrum).mean((1, 2))
    s_br = (a * lost * spectrum).mean((1, 2))
    s_r2 = (lost.square() * spectrum).mean((1, 2))
    sigma, s_b, v = level.sigma, s_b2.sqrt(), s_b2 + level.sigma.square()
    c_in = v.rsqrt()
    return Coefficients(
        v=v,
        s_b=s_b,
        c_in=c_in,
        c_skip_b=s_b2 / v,
        c_out_b=sigma * s_b * c_in,
        c_skip_r=s_br / v,
        c_out_r=(s_r2 - s_br.square() / v).clamp_min(0).sqrt(),  # >= 0 by Cauchy-Schwarz; the clamp is for rounding
    )


def data_spectrum(info: DataInfo, sigma_data: str | float) -> Tensor:
    """The power spectrum used in preconditioning, (H, W) float64: measured, or 1/f² with the given sigma_data."""
    if sigma_data == "measured":
        return torch.tensor(info.power_spectrum, dtype=torch.float64)
    return fallback_spectrum(info.resolution, info.resolution, float(sigma_data))


def level_inputs(level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """The network's level inputs ln(σ)/4 and ln(1 + α²)/4, (B,) each, in the dtype of x."""
    both = level.sigma.log() / 4, torch.log1p(level.alpha.square()) / 4
    return both[0].to(x.dtype).expand(len(x)), both[1].to(x.dtype).expand(len(x))


def evaluate(
    network: Network, x: Tensor, level: Level, c: Coefficients, condition: Condition = ()
) -> tuple[Tensor, Tensor]:
    """The raw outputs (F_b, F_R) of both heads, each (B, C, H, W) in the dtype of x."""
    out = network(expand(c.c_in, x) * x, *level_inputs(level, x), *condition)
    blurry, residual = out.to(x.dtype).chunk(2, dim=1)
    return blurry, residual


def assemble(f_b: Tensor, f_r: Tensor, x: Tensor, c: Coefficients) -> Heads:
    """Scale the raw outputs to estimates: b̂ = c_skip,b x + c_out,b F_b and R̂ = c_skip,R x + c_out,R F_R."""
    return Heads(
        expand(c.c_skip_b, x) * x + expand(c.c_out_b, x) * f_b,
        expand(c.c_skip_r, x) * x + expand(c.c_out_r, x) * f_r,
    )


def heads(network: Network, spectrum: Tensor, x: Tensor, level: Level, condition: Condition = ()) -> Heads:
    """Both heads' estimates, in the dtype of x. level: (B,) or (1,) each."""
    c = coefficients(spectrum, level)
    f_b, f_r = evaluate(network, x, level, c, condition)
    with exact_float32():
        return assemble(f_b, f_r, x, c)


def inconsistency(estimate: Heads, level: Level) -> Tensor:
    """The diagnostic |b̂ − A x̂0| / |b̂|, (B,): 0 when both heads describe the same image. Source: derived."""
    with exact_float32():
        # b̂ − A(b̂ + R̂) = (I − A) b̂ − A R̂, and `unblurred` computes the first part without cancellation
        gap = unblurred(estimate.blurry, level.alpha) - blur(estimate.residual, level.alpha)
        size, whole = (part.square().sum((1, 2, 3)) for part in (gap, estimate.blurry))
        return (size / whole).sqrt()


def targets(x0: Tensor, level: Level, noise: Tensor, c: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """The corrupted input x and the targets (T_b, T_R) of the raw outputs, each (B, C, H, W); T_R is 0 where α is 0.

    T_b = (A x0 − c_skip,b x)/c_out,b, written as ((σ/s_b) A x0 − s_b ε)/√v to avoid cancellation at small σ.
    """
    with exact_float32():
        blurry, residual = split(x0, level.alpha)
        seen = c.c_out_r > 0
        scale = torch.where(seen, 1 / torch.where(seen, c.c_out_r, 1.0), 0.0)  # masked before the division
        factors = level.sigma, level.sigma / (c.s_b * c.v.sqrt()), c.s_b * c.c_in, scale, scale * c.c_skip_r
        sigma, data, epsilon, to_residual, to_x = torch.stack(factors).to(x0.dtype)[..., None, None, None]
        x = blurry + sigma * noise
        return x, data * blurry - epsilon * noise, to_residual * residual - to_x * x


def loss(
    network: Network,
    spectrum: Tensor,
    x0: Tensor,
    level: Level,
    noise: Tensor,
    condition: Condition = (),
    residual_weight: str = "one",
    diagnose: bool = False,
) -> Loss:
    """The training loss |F_b − T_b|² + w_R |F_R − T_R|², mean per pixel.

    x0, noise: (B, C, H, W) float32, x0 less the channel means. level: (B,) float64 each. spectrum: (H, W) float64.
    residual_weight, with q = c_out,R²/c_out,b²: "one": w_R = 1; "balanced": min(1, q); "denoiser": q, so that both
    errors are weighted by 1/c_out,b² in data units; "sampler": q, the error first filtered by G = λα² e^{−λα²/2}, its
    gain in dx/d ln σ at constant BNR. w_R = 0 where α = 0. diagnose: compute the inconsistency too.
    """
    c = coefficients(spectrum, level)
    x, t_b, t_r = targets(x0, level, noise, c)
    f_b, f_r = evaluate(network, x, level, c, condition)
    with exact_float32():
        seen = (c.c_out_r > 0).float()
        blurry, error = (f_b - t_b).square().mean((1, 2, 3)), f_r - t_r
        residual = weighted = error.square().mean((1, 2, 3)) * seen
        if residual_weight == "sampler":
            weighted = _sampler_gain(error, level.alpha).square().mean((1, 2, 3)) * seen
        if residual_weight != "one":
            q = (c.c_out_r / c.c_out_b).square()
            weighted = weighted * (q.clamp_max(1) if residual_weight == "balanced" else q).float()
        gap = None
        if diagnose:
            with torch.no_grad():
                gap = inconsistency(assemble(f_b, f_r, x, c), level).float()
        return Loss(blurry, residual, blurry + weighted, gap)


def _sampler_gain(error: Tensor, alpha: Tensor) -> Tensor:
    exponent = eigenvalues(*error.shape[-2:], device=error.device) * alpha[:, None, None, None].square()
    return idct((exponent * torch.exp(-exponent / 2)).to(error.dtype) * dct(error))
