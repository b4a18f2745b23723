"""The state of a run as named tensors, to write to a checkpoint and to load from one."""

from __future__ import annotations

from torch import Tensor

from warm_dist.checkpoints.format import Saved, Targets, load_saved
from warm_dist.networks.flat import published
from warm_dist.training.ema import EMA
from warm_dist.training.engine import STATE, Engine


def state_tensors(engine: Engine, emas: dict[str, EMA]) -> dict[str, Tensor]:
    """This rank's share of master weights, Adam moments and EMAs, flat float32, by KIND/NAME@START."""
    out = {f"{key}/{f.name}@{f.start}": getattr(f, key) for f in engine.shard() for key in STATE}
    return out | ema_tensors(emas)


def ema_tensors(emas: dict[str, EMA]) -> dict[str, Tensor]:
    """This rank's share of the EMAs, flat float32, by KIND/NAME@START."""
    return {
        f"{kind}/{f.name}@{f.start}": value
        for kind, ema in emas.items()
        for f, value in zip(ema.fragments, ema.values, strict=True)
    }


def load_state(saved: Saved, rank: int, engine: Engine, emas: dict[str, EMA]) -> None:
    """Fill the engine and the EMAs from a checkpoint of any world size and stage. Errors as `load_saved`."""
    targets: Targets = {}
    for f in engine.fragments():
        for key in STATE:
            targets.setdefault((key, f.name), []).append((f.start, getattr(f, key)))
    for kind, ema in emas.items():
        for f, value in zip(ema.fragments, ema.values, strict=True):
            targets.setdefault((kind, f.name), []).append((f.start, value))
    load_saved(saved, rank, targets, published(engine.module))
    engine.after_load(saved.meta["num_steps"])
