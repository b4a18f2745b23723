"""A small network's state, saved by one rank."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.support.tiny_run import ALONE, info
from warm_dist.checkpoints.format import CHECKPOINTS, Saved
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.config.load import dump
from warm_dist.config.run import Config
from warm_dist.training.ema import EMA, half_life
from warm_dist.training.engine import LocalEngine
from warm_dist.training.state import state_tensors


def ema_of(engine: LocalEngine) -> EMA:
    return EMA(engine.shard(), partial(half_life, 100, None))


def save(run: Path, state: tuple[Config, LocalEngine, EMA], nimg: int) -> Saved:
    """As the only rank, into the run's folder."""
    settings, engine, ema = state
    storage = CheckpointManager(run, ALONE, settings.checkpoint, print)
    meta = {"num_steps": nimg // 8, "config": dump(settings), "data": info().to_json(), "fingerprint": "x"}
    storage.save(CHECKPOINTS, nimg, state_tensors(engine, {"ema": ema}), meta)
    return storage.saved(nimg)
