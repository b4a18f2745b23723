"""The state of a run as named tensors: what a checkpoint is given to write, and where it loads into."""

from __future__ import annotations

from torch import Tensor

from warm_dist.training.ema import EMA
from warm_dist.training.engine import STATE, Engine

# -- writing --------------------------------------------------------------------------------------------------------


def tensors_of(engine: Engine, emas: dict[str, EMA]) -> dict[str, Tensor]:
    """This rank's share of the whole state by KIND/NAME@START."""
    out = {f"{key}/{f.name}@{f.start}": getattr(f, key) for f in engine.owned() for key in STATE}
    return out | ema_tensors(emas)


def ema_tensors(emas: dict[str, EMA]) -> dict[str, Tensor]:
    """This rank's share of the EMAs by KIND/NAME@START."""
    return {
        f"{kind}/{f.name}@{f.start}": value
        for kind, ema in emas.items()
        for f, value in zip(ema.fragments, ema.values, strict=True)
    }
