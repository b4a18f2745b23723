"""Exponential moving average of the weights, sharded exactly as the optimizer: 1/W of the model, no communication."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from warm_dist.distributed import World
from warm_dist.engine import Fragment


class EMA:
    """Shadows of this rank's own master fragments, float32; `values[k]` belongs to `fragments[k]`.

    After an update of b images at nimg, beta = 0.5^(b / min(half_life, ramp · nimg)). Source: EDM, appendix F.3.
    """

    def __init__(self, fragments: list[Fragment], half_life_nimg: int, ramp: float | None) -> None:
        self.fragments, self.half_life_nimg, self.ramp = fragments, half_life_nimg, ramp
        self.values = [f.master.detach().clone() for f in fragments]
        self._masters = [f.master for f in fragments]

    def beta(self, nimg: int, num_images: int) -> float:
        """The weight of the past after training on `num_images` more, up to `nimg`."""
        half_life = min(float(self.half_life_nimg), self.ramp * nimg if self.ramp else float("inf"))
        return float(0.5 ** (num_images / max(half_life, 1e-8)))

    @torch.no_grad()
    def update(self, nimg: int, num_images: int) -> None:
        """Move the shadows towards the masters."""
        if self.values:
            torch._foreach_lerp_(self.values, self._masters, 1 - self.beta(nimg, num_images))

    def full(self, world: World, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Every parameter's average, whole, on every rank (for sampling). A collective.

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
