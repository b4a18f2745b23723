"""One rank's step, made ready: images augmented and centred, every random number drawn, all of it on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warm_dist import augment, rng
from warm_dist.config.run import Config
from warm_dist.data import Batch, DataInfo, centre
from warm_dist.diffusion.heads import Condition
from warm_dist.diffusion.process import Level, training_level


class Prepared(NamedTuple):
    """One rank's step, drawn and on its device: x0 (B, C, H, W) centred, level (B,), noise, condition, the samples."""

    x0: Tensor
    level: Level
    noise: Tensor
    condition: Condition
    batch: Batch


def prepare(batch: Batch, config: Config, info: DataInfo, device: torch.device) -> Prepared:
    """Augment, centre, and draw every random number of the batch from its images' global positions."""
    train, positions = config.train, [int(p) for p in batch.positions]
    uniform = rng.uniforms(train.seed, "augment", positions, 2)
    images = batch.images
    if train.horizontal_flips:
        flipped = uniform[:, 0] < 0.5
        images = images.copy()
        images[flipped] = images[flipped][..., ::-1]
    labels = batch.labels.copy()
    labels[uniform[:, 1] < train.label_dropout] = -1
    normal = torch.from_numpy(rng.normals(train.seed, "level", positions, (1,))[:, 0])
    ratio = torch.from_numpy(rng.uniforms(train.seed, "bnr", positions, 1)[:, 0])
    noise = rng.normals(train.seed, "noise", positions, images.shape[1:])

    def send(array: Any) -> Tensor:
        tensor = torch.as_tensor(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    x0 = centre(send(images), torch.tensor(info.channel_mean, device=device))
    condition: Condition = (send(labels),)
    if train.augment:
        drawn = augment.draw(train.seed, positions, train.augment, *images.shape[2:])
        x0 = augment.warp(x0, send(drawn.matrix))
        condition = (*condition, send(drawn.labels))
    level = training_level(config.process, normal, ratio, images.shape[3])  # on the host: equal on every device
    return Prepared(x0, Level(*map(send, level)), send(noise), condition, batch)
