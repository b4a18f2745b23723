"""Guidance: away from what a weaker estimate says. Source: classifier-free guidance (arXiv 2207.12598), autoguidance (arXiv 2406.02507)."""

from __future__ import annotations

from torch import Tensor

from warm_dist.sampler import Denoise
from warm_dist.types import Heads, Level


def guided(denoise: Denoise, guide: Denoise, weight: float) -> Denoise:
    """Both heads extrapolated: b̂ = b̂_guide + w (b̂ − b̂_guide), R̂ alike; two network evaluations a call.

    guide: the same network without class (classifier-free guidance), or a weaker network (autoguidance). w = 1 is
    `denoise` alone, w = 0 the guide alone. Linear in the heads, so x̂0 = b̂ + R̂ and the score are guided alike.
    """

    def combined(x: Tensor, level: Level) -> Heads:
        strong, weak = denoise(x, level), guide(x, level)
        return Heads(*(low + weight * (high - low) for high, low in zip(strong, weak, strict=True)))

    return combined
