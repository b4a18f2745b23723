"""The smallest training that is one: its configuration, its data, a trainer, and its state as four numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from warm_dist import rng
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.config.run import Config, validate
from warm_dist.data import Batch, DataInfo
from warm_dist.distributed.world import World
from warm_dist.training.inputs import prepare
from warm_dist.training.step_metrics import SUMS
from warm_dist.training.trainer import Trainer

BATCH = 16
ALONE = World(0, 1, torch.device("cpu"), None)


def config(output: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "output": str(output),
        "engine": "deepspeed",
        "data": {"manifest": "unused", "resolution": 8, "num_lanes": BATCH},
        "process": {"bnr": 0.5},
        "network": {
            "arch": "ddpmpp",
            "channels": 16,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "attention_resolutions": [4],
        },
        "train": {
            "total_nimg": BATCH * 50,
            "batch_size": BATCH,
            "lr": 1e-3,
            "lr_ramp_nimg": BATCH * 4,
            "eps": 1e-4,  # Adam's step is then smooth in the gradient, and rounding does not grow through its sign
            "clip": 1.0,
            "horizontal_flips": True,
            "ema_half_life_nimg": 100,
            "log_nimg": BATCH,
            "save_nimg": BATCH * 10,
        },
    }
    for path, value in changes.items():
        section, key = path.split("__") if "__" in path else (None, path)
        (tree if section is None else tree.setdefault(section, {}))[key] = value
    return validate(tree)


def info() -> DataInfo:
    spectrum = np.full((8, 8), 0.25)
    low = np.zeros(48), 0.25 * np.eye(48)
    return DataInfo(8, 3, 0, 64, np.zeros(3), np.zeros((3, 8, 8)), spectrum, 0.5, *low, "synthetic")


def batches(world: World, nimg: int, poison: int | None = None) -> Iterator[Batch]:
    """Image p is noise drawn from p: the same at every world size. `poison`: from there on images are out of range."""
    while True:
        share = BATCH // world.size
        positions = np.arange(nimg + world.rank * share, nimg + (world.rank + 1) * share)
        images = np.stack(
            [rng.generator(1, "image", int(p)).integers(0, 256, (3, 8, 8), dtype=np.uint8) for p in positions]
        )
        yield Batch(images, np.full(share, -1), positions, tuple(f"image{p}" for p in positions))
        nimg += BATCH


def start(world: World, settings: Config) -> Trainer:
    """A trainer that has taken up its run's newest checkpoint, if there is one."""
    run = Path(settings.output)
    run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        settings, world, info(), lambda text: None, CheckpointManager(run, world, settings.checkpoint, print)
    )
    trainer.restore()
    return trainer


def steps(world: World, trainer: Trainer, count: int) -> tuple[list[float], list[float]]:
    """The losses, averaged over the batch, and the gradient norms of the next steps."""
    losses, norms = [], []
    source = batches(world, trainer.nimg)
    for _ in range(count):
        trainer.step(prepare(next(source), trainer.config, trainer.info, world.device))
        sums = trainer.metrics.sums.clone()
        trainer.metrics.sums.zero_()
        dist.all_reduce(sums)
        losses.append(float(sums[SUMS.index("loss")] / sums[SUMS.index("images")]))
        norms.append(float(trainer.grad_norm))
    return losses, norms


def state_digest(world: World, trainer: Trainer) -> list[float]:
    """Sums that are equal only if master weights, both moments and the EMA are, over all ranks."""
    sums = torch.zeros(4, dtype=torch.float64)
    for fragment, value in zip(trainer.engine.shard(), trainer.emas["ema"].values, strict=True):
        for k, tensor in enumerate((fragment.master, fragment.exp_avg, fragment.exp_avg_sq, value)):
            place = torch.arange(fragment.start, fragment.start + fragment.numel, dtype=torch.float64)
            sums[k] += (tensor.double() * torch.cos(place)).sum()
    dist.all_reduce(sums)
    return sums.tolist()
