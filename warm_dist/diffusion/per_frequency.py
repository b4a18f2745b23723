"""The one-head ablation: each DCT mode is scaled by its own power, which makes both heads' targets identical.

With P = a²S + σ² per mode: c_in = P^(−½), x̂0 = (aS/P) u + σ√(S/P) F, b̂ = A x̂0, R̂ = (I − A) x̂0. It tests whether
two heads help. Source: derived, docs/mathematics.md, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from warm_dist.config.run import Config
from warm_dist.diffusion.heads import Condition, Heads, Loss, Network, level_inputs
from warm_dist.diffusion.heads import loss as heads_loss
from warm_dist.diffusion.process import Level, corrupt
from warm_dist.diffusion.spectrum import dct, eigenvalues, exact_float32, idct, split


class Scales(NamedTuple):
    """Preconditioning per mode, (B, 1, H, W) float64 each; the target is t_data u0 − t_noise ε."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor
    t_data: Tensor
    t_noise: Tensor


def scales(spectrum: Tensor, level: Level) -> Scales:
    """The scales at each image's (α, σ); where S is 0, so are target and output. spectrum: (H, W) float64, S."""
    alpha, sigma = level.alpha[:, None, None, None], level.sigma[:, None, None, None]
    a = torch.exp(-eigenvalues(*spectrum.shape, device=spectrum.device) * alpha.square() / 2)
    power = a.square() * spectrum + sigma.square()
    root = (spectrum / power).sqrt()
    t_data = torch.where(spectrum > 0, sigma / (torch.where(spectrum > 0, spectrum, 1.0) * power).sqrt(), 0.0)
    return Scales(power.rsqrt(), a * spectrum / power, sigma * root, t_data, a * root)


def evaluate(network: Network, x: Tensor, level: Level, c: Scales, condition: Condition) -> Tensor:
    """The raw output F at the whitened input, (B, C, H, W) in the dtype of x."""
    return network(idct(c.c_in.to(x.dtype) * dct(x)), *level_inputs(level, x), *condition).to(x.dtype)


def heads(network: Network, spectrum: Tensor, x: Tensor, level: Level, condition: Condition = ()) -> Heads:
    """Both estimates from the one head, in the dtype of x. level: (B,) or (1,) each."""
    c = scales(spectrum, level)
    out = evaluate(network, x, level, c, condition)
    clean = idct(c.c_skip.to(x.dtype) * dct(x) + c.c_out.to(x.dtype) * dct(out))
    return Heads(*split(clean, level.alpha))


def loss(
    network: Network,
    spectrum: Tensor,
    x0: Tensor,
    level: Level,
    noise: Tensor,
    condition: Condition = (),
    diagnose: bool = False,
) -> Loss:
    """The training loss |F − T|², mean per pixel; T has unit second moment in every mode. Arguments as `heads.loss`."""
    c = scales(spectrum, level)
    out = evaluate(network, corrupt(x0, level, noise), level, c, condition)
    with exact_float32():
        target = idct(c.t_data.to(x0.dtype) * dct(x0) - c.t_noise.to(x0.dtype) * dct(noise))
        total = (out - target).square().mean((1, 2, 3))
        nothing = torch.zeros_like(total)
        return Loss(total, nothing, total, nothing if diagnose else None)  # one head cannot contradict itself


def loss_function(config: Config) -> Callable[..., Loss]:
    """The loss selected by process.preconditioning and process.residual_weight."""
    if config.process.preconditioning == "per_frequency":
        return loss
    return partial(heads_loss, residual_weight=config.process.residual_weight)
