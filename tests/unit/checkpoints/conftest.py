"""A state to save, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.saved_state import ema_of
from tests.support.tiny_run import ALONE, config
from warm_dist.config.run import Config
from warm_dist.networks.unet import build_network
from warm_dist.training.ema import EMA
from warm_dist.training.engine import LocalEngine


@pytest.fixture
def state(tmp_path: Path) -> tuple[Config, LocalEngine, EMA]:
    """Weights, moments and an EMA that differ from one another."""
    settings = config(tmp_path, engine="local")
    engine = LocalEngine(build_network(settings), settings, ALONE)
    for k, f in enumerate(engine.shard()):
        f.exp_avg.fill_(k)
        f.exp_avg_sq.copy_(torch.arange(f.numel))
    ema = ema_of(engine)
    for value in ema.values:
        value.add_(1)
    return settings, engine, ema


@pytest.fixture
def said() -> list[str]:
    return []
