"""Images from a network; image k has the same noise at any world size and batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from warm_dist import rng
from warm_dist.checkpoints.weights import Model
from warm_dist.config.bnr import Cold
from warm_dist.config.run import SamplerConfig, check_sampling
from warm_dist.data import to_uint8
from warm_dist.diffusion import per_frequency
from warm_dist.diffusion.heads import Heads, data_spectrum, heads
from warm_dist.diffusion.process import Level
from warm_dist.diffusion.samplers import Denoise, cold_start, guided, sampler_of, schedule, start
from warm_dist.errors import NumericsError


def sample_labels(seed: int, indices: Sequence[int], num_classes: int) -> NDArray[np.int64]:
    """A uniformly drawn class for each image, (len(indices),); -1 without classes."""
    if not num_classes:
        return np.full(len(indices), -1, np.int64)
    drawn = [draw.integers(num_classes) for draw in rng.generators(seed, "sample label", indices)]
    return np.array(drawn, np.int64)


Watch = Callable[[Tensor, Level, Heads], None]
"""Called at every evaluation of the sampler with the state x, its level, and both heads."""


def denoiser(model: Model, labels: Tensor | None, device: torch.device) -> Denoise:
    """The network as samplers call it: (x, level) → heads. labels: (B,) int64; None or -1 for no class."""
    process = model.config.process
    spectrum = data_spectrum(model.info, process.sigma_data).to(device)
    estimate = per_frequency.heads if process.preconditioning == "per_frequency" else heads
    return lambda x, level: estimate(model.network, spectrum, x, level, (labels,))


@torch.inference_mode()
def generate(
    model: Model,
    indices: Sequence[int],
    labels: NDArray[np.int64],
    *,
    seed: int,
    device: torch.device,
    batch_size: int,
    sampler: SamplerConfig | None = None,
    guide: Model | None = None,
    watch: Watch | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> NDArray[np.uint8]:
    """Generate the images `indices` of the stream `seed`, (len(indices), C, H, W) uint8.

    labels: (len(indices),), -1 for none. sampler: replaces the config's. guide: the network of sampler.guide, see
    `load_guide`; without one the model without labels guides. progress: called with the size of each batch.
    Raises ConfigError if this network cannot be sampled so, NumericsError for a non-finite image.
    """
    _, config, info = model
    options = sampler or config.sampler
    check_sampling(config, options)
    for part in (model, guide):
        if part is not None:
            part.network.eval()
    path, points = schedule(config, options)
    solve = sampler_of(options, path)
    channel_mean = torch.tensor(info.channel_mean, device=device)
    shape = (info.channels, info.resolution, info.resolution)
    out = np.empty((len(indices), *shape), np.uint8)
    for low in range(0, len(indices), batch_size):
        part_indices = list(indices[low : low + batch_size])
        given = torch.from_numpy(labels[low : low + batch_size]).to(device)

        def normals(purpose: str, *shape: int, part: list[int] = part_indices) -> Tensor:
            return torch.from_numpy(rng.normals(seed, purpose, part, shape)).double().to(device)

        denoise = denoiser(model, given, device)
        if options.guidance != 1:
            weaker = denoiser(guide, given, device) if guide else denoiser(model, None, device)
            denoise = guided(denoise, weaker, options.guidance)
        if isinstance(path, Cold) and options.start == "measured":
            x = cold_start(normals("sample", *shape), normals("sample start", len(info.low_mean)), points[0], info)
        else:
            x = start(normals("sample", *shape), points[0], info if options.start == "measured" else None)

        def fresh(step: int, draw: Callable[..., Tensor] = normals) -> Tensor:
            return draw(f"sample step {step}", *shape)

        x = solve(_watched(denoise, watch), x, points, fresh)
        if not bool(torch.isfinite(x).all()):
            first, last = part_indices[0], part_indices[-1]
            raise NumericsError(f"sampling gave a non-finite image among numbers {first} to {last}")
        out[low : low + len(part_indices)] = to_uint8(x, channel_mean).cpu().numpy()
        progress(len(part_indices))
    return out


def _watched(denoise: Denoise, watch: Watch | None) -> Denoise:
    if watch is None:
        return denoise

    def seen(x: Tensor, level: Level) -> Heads:
        estimate = denoise(x, level)
        watch(x, level, estimate)
        return estimate

    return seen
