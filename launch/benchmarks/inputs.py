"""What the host does for a step ahead of it: images/s of `prepare` on one core, all random numbers included."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from launch.benchmarks.result import ROOT, Spread

if TYPE_CHECKING:
    from warm_dist.config.run import Config

BATCH = 256
CASES = {"cifar10": ["train.augment=0"], "imagenet64": []}
"""Config → changes. On a CPU the warp of `train.augment` would be most of it; with a GPU it is the GPU's work."""


def prepare_rate(config: Config, rounds: int) -> Spread:
    """Images a second of processor time that one thread prepares, in the config's batches, after one that warms up."""
    import torch

    from launch.benchmarks.pictures import images, made_up
    from warm_dist.distributed.world import World
    from warm_dist.training.inputs import prepare

    world, info, threads = World(0, 1, torch.device("cpu"), None), made_up(config), torch.get_num_threads()
    batches, rates = images(config, world), []
    torch.set_num_threads(1)
    try:
        for _ in range(rounds + 1):
            batch = next(batches)
            began = time.thread_time()
            prepare(batch, config, info, world.device)
            rates.append(config.train.batch_size / (time.thread_time() - began))
    finally:
        torch.set_num_threads(threads)
    return Spread.of(rates[1:])


def rates(rounds: int) -> dict[str, Spread]:
    """`prepare_rate` of each of CASES, in batches of BATCH."""
    from warm_dist.config.run import load_config

    files = {name: str(ROOT / "configs" / f"{name}.json") for name in CASES}
    return {
        name: prepare_rate(load_config(files[name], [f"train.batch_size={BATCH}", *changes]), rounds)
        for name, changes in CASES.items()
    }
