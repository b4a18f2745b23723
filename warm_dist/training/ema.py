"""Exponential moving averages of the weights, sharded like the optimizer: 1/W of the model, no communication."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from warm_dist.config.run import TrainConfig
from warm_dist.distributed.world import World
from warm_dist.training.engine import Fragment

Decay = Callable[[int, int], float]
"""(nimg, num_images) → beta, the factor of the old average after training on num_images more, up to nimg."""


def half_life(half_life_nimg: int, ramp: float | None, nimg: int, num_images: int) -> float:
    """beta = 0.5^(b / min(half_life, ramp · nimg)). Source: EDM (arXiv 2206.00364), appendix F.3."""
    shortest = min(float(half_life_nimg), ramp * nimg if ramp else float("inf"))
    return float(0.5 ** (num_images / max(shortest, 1e-8)))


def power(exponent: float, nimg: int, num_images: int) -> float:
    """beta = (1 - b/nimg)^(exponent + 1): weights at time t contribute in proportion to t^exponent.

    Source: EDM2 (arXiv 2312.02696), section 3.1.
    """
    return float((1 - num_images / nimg) ** (exponent + 1))


def exponent_of(sigma_rel: float) -> float:
    """The exponent of the power function with relative standard deviation sigma_rel, in (0, 0.288).

    The largest root of (γ+1) / ((γ+2)² (γ+3)) = sigma_rel². Source: EDM2, section 3.1 and appendix C.1.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def kind_of(sigma_rel: float) -> str:
    """The name of a power-function EMA in checkpoints and snapshots."""
    return f"ema_{sigma_rel:g}"


class EMA:
    """Averages of this rank's shard of the master weights, float32; `values[k]` belongs to `fragments[k]`."""

    def __init__(self, fragments: list[Fragment], decay: Decay) -> None:
        self.fragments, self.decay = fragments, decay
        self.values = [f.master.detach().clone() for f in fragments]
        self._masters = [f.master for f in fragments]

    @torch.no_grad()
    def update(self, nimg: int, num_images: int) -> None:
        """Move the averages towards the weights, after training on `num_images` more, up to `nimg`."""
        if self.values:
            torch._foreach_lerp_(self.values, self._masters, 1 - self.decay(nimg, num_images))

    def full(self, world: World, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Every parameter's whole average by name, on every rank. A collective.

        Exact: each element is the sum of its owner's value and zeros.
        """
        local: dict[str, list[tuple[int, Tensor]]] = {}
        for fragment, value in zip(self.fragments, self.values, strict=True):
            local.setdefault(fragment.name, []).append((fragment.start, value))
        out = {}
        for name, shape in shapes.items():
            flat = torch.zeros(shape.numel(), device=world.device)
            for start, value in local.get(name, []):
                flat[start : start + value.numel()] = value
            if world.size > 1:
                dist.all_reduce(flat)
            out[name] = flat.view(shape)
        return out


def averages(fragments: list[Fragment], train: TrainConfig) -> dict[str, EMA]:
    """The config's EMAs by their names in a checkpoint; "ema" is the one used for sampling."""
    out = {"ema": EMA(fragments, partial(half_life, train.ema_half_life_nimg, train.ema_ramp))}
    return out | {kind_of(s): EMA(fragments, partial(power, exponent_of(s))) for s in train.ema_lengths}
