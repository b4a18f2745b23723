"""What the host does for a step ahead of it: images/s of `prepare` on one core, all random numbers included."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from launch.benchmarks.result import Spread

if TYPE_CHECKING:
    from warm_dist.config.run import Config
    from warm_dist.data import Batch


def prepare_rate(config: Config, images: int, rounds: int) -> Spread:
    """Images a second of processor time that one thread prepares, in batches of `images`, after one that warms up.

    The config's resolution, channels, classes, augmentation and levels; made-up pictures, a batch of new positions a
    round. On a CPU the warp of `train.augment` is part of it; on a GPU it is the GPU's work, so measure the host there
    with train.augment=0 (drawing the transforms takes 3 µs an image).
    """
    import torch

    from launch.benchmarks.pictures import made_up
    from warm_dist.training.inputs import prepare

    info, device, threads = made_up(config), torch.device("cpu"), torch.get_num_threads()
    rates = []
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            batch = _batch(config, images, number * images)
            began = time.thread_time()
            prepare(batch, config, info, device)
            rates.append(images / (time.thread_time() - began))
    finally:
        torch.set_num_threads(threads)
    return Spread.of(rates[1:])


def _batch(config: Config, images: int, nimg: int) -> Batch:
    import numpy as np

    from warm_dist.data import Batch
    from warm_dist.rng import generator

    shape = (images, config.data.channels, config.data.resolution, config.data.resolution)
    pictures = generator(0, "bench").integers(0, 256, shape, dtype=np.uint8)
    labels = np.full(images, 0 if config.data.num_classes else -1)
    return Batch(pictures, labels, np.arange(nimg, nimg + images), ("",) * images)
