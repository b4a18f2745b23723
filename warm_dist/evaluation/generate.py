"""Images from a network; image k has the same noise at any world size and batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from warm_dist import rng
from warm_dist.checkpoints.weights import Model
from warm_dist.config.bnr import Cold
from warm_dist.config.run import Config, SamplerConfig, check_sampling, sampling_precision
from warm_dist.data import to_uint8
from warm_dist.diffusion import per_frequency
from warm_dist.diffusion.heads import Heads, data_spectrum, heads
from warm_dist.diffusion.process import Level
from warm_dist.diffusion.samplers import Denoise, cold_start, guided, sampler_of, schedule, start
from warm_dist.distributed.world import use_device
from warm_dist.errors import NumericsError, print_once
from warm_dist.networks.memory import forward_bytes_per_image
from warm_dist.networks.precision import DTYPES, set_precision

MOST_IMAGES = 512  # at a time: more hardly make a GPU faster, and a run that is asked to stop waits for them


def sample_labels(
    seed: int, indices: Sequence[int], num_classes: int, counts: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """A class for each image, (len(indices),); -1 without classes.

    counts: (num_classes,), drawn in proportion to them; None: evenly.
    """
    if not num_classes:
        return np.full(len(indices), -1, np.int64)
    generators = rng.generators(seed, "sample label", indices)
    if counts is None:
        return np.array([draw.integers(num_classes) for draw in generators], np.int64)
    bounds = np.cumsum(counts) / np.sum(counts)
    return np.searchsorted(bounds, [draw.random() for draw in generators], side="right").astype(np.int64)


def draw_labels(model: Model, sampler: SamplerConfig, seed: int, indices: Sequence[int]) -> NDArray[np.int64]:
    """A class for each image, (len(indices),), as sampler.classes says; -1 without classes."""
    num_classes, counts = model.config.data.num_classes, model.info.class_counts
    if sampler.classes == "even" or not num_classes:
        return sample_labels(seed, indices, num_classes)
    if len(counts) != num_classes:
        print_once(
            "these weights do not know the classes' shares, since an older version wrote them; drawn evenly",
            shared=True,
        )
        return sample_labels(seed, indices, num_classes)
    return sample_labels(seed, indices, num_classes, counts)


def fitting_batch(config: Config, precision: str, device: torch.device, count: int) -> int:
    """How many images of `count` to sample at a time: 64 on a CPU; on a GPU the power of two that takes half of what is free.

    precision: of the network. The other half is for what the prediction leaves out, see `networks.memory`.
    """
    if device.type != "cuda" or count <= 64:
        return 64
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return power_of_two_below(free / 2 / forward_bytes_per_image(config, dtype=DTYPES[precision]))


def power_of_two_below(count: float) -> int:
    """The largest power of two that is not above count, from 1 to MOST_IMAGES."""
    return int(2 ** math.floor(math.log2(min(max(count, 1), MOST_IMAGES))))


Watch = Callable[[Tensor, Level, Heads], None]
"""Called at every evaluation of the sampler with the state x, its level, and both heads."""


def denoiser(model: Model, labels: Tensor | None, device: torch.device) -> Denoise:
    """The network as samplers call it: (x, level) → heads. labels: (B,) int64; None or -1 for no class."""
    process = model.config.process
    spectrum = data_spectrum(model.info, process.sigma_data).to(device)
    estimate = per_frequency.heads if process.preconditioning == "per_frequency" else heads
    return lambda x, level: estimate(model.network, spectrum, x, level, (labels,))


class StepNoise:
    """The normals of a batch at each step of a sampler, those of the next step drawn in a thread ahead of their use.

    images: numbers in the stream `seed`; shape: of one. A context manager.
    """

    def __init__(self, seed: int, images: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        self.seed, self.images, self.shape, self.device = seed, images, shape, device
        self._pool = ThreadPoolExecutor(1, "noise", initializer=use_device, initargs=(device,))
        self._ahead: dict[int, Future[Tensor]] = {}

    def __enter__(self) -> StepNoise:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, step: int) -> None:
        """Begin to draw the normals of a step; a second time it does nothing."""
        if step not in self._ahead:
            self._ahead[step] = self._pool.submit(self._draw, step)

    def __call__(self, step: int) -> Tensor:
        """The normals of a step, (B, *shape) float64 on the device; the next step's are then begun."""
        self.start(step)
        drawn = self._ahead.pop(step).result()
        self.start(step + 1)
        return drawn.to(self.device, non_blocking=True).double()

    def _draw(self, step: int) -> Tensor:
        drawn = torch.from_numpy(rng.normals(self.seed, f"sample step {step}", self.images, self.shape))
        return drawn.pin_memory() if self.device.type == "cuda" else drawn


@torch.inference_mode()
def generate(
    model: Model,
    indices: Sequence[int],
    labels: NDArray[np.int64],
    *,
    seed: int,
    device: torch.device,
    batch_size: int,
    fill: bool = False,
    sampler: SamplerConfig | None = None,
    guide: Model | None = None,
    watch: Watch | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> NDArray[np.uint8]:
    """Generate the images `indices` of the stream `seed`, (len(indices), C, H, W) uint8.

    labels: (len(indices),), -1 for none. fill: batches too small are filled up with their last image, so that a compiled
    network sees one shape. sampler: replaces the config's. guide: the network of sampler.guide, see `load_guide`;
    without one the model without labels guides. progress: called with the size of each batch. Computes in float64
    outside the networks, whose precision is the sampler's. Raises ConfigError if this network cannot be sampled so,
    NumericsError for a non-finite image.
    """
    _, config, info = model
    options = sampler or config.sampler
    check_sampling(config, options)
    for used in (model, guide):
        if used is not None:
            set_precision(used.network.eval(), sampling_precision(config, options))
    path, points = schedule(config, options)
    solve = sampler_of(options, path)
    channel_mean = torch.tensor(info.channel_mean, device=device)
    shape = (info.channels, info.resolution, info.resolution)
    out = np.empty((len(indices), *shape), np.uint8)
    for low in range(0, len(indices), batch_size):
        part = list(indices[low : low + batch_size])
        extra = batch_size - len(part) if fill else 0
        images = part + part[-1:] * extra
        given = torch.from_numpy(np.pad(labels[low : low + batch_size], (0, extra), "edge")).to(device)

        def normals(purpose: str, *shape: int, images: list[int] = images) -> Tensor:
            return torch.from_numpy(rng.normals(seed, purpose, images, shape)).to(device).double()

        denoise = denoiser(model, given, device)
        if options.guidance != 1:
            weaker = denoiser(guide, given, device) if guide else denoiser(model, None, device)
            denoise = guided(denoise, weaker, options.guidance)
        if isinstance(path, Cold) and options.start == "measured":
            x = cold_start(normals("sample", *shape), normals("sample start", len(info.low_mean)), points[0], info)
        else:
            x = start(normals("sample", *shape), points[0], info if options.start == "measured" else None)
        with StepNoise(seed, images, shape, device) as noise:
            x = solve(_watched(denoise, watch), x, points, noise)[: len(part)]
        if not bool(torch.isfinite(x).all()):
            raise NumericsError(f"sampling gave a non-finite image among numbers {part[0]} to {part[-1]}")
        out[low : low + len(part)] = to_uint8(x, channel_mean).cpu().numpy()
        progress(len(part))
    return out


def _watched(denoise: Denoise, watch: Watch | None) -> Denoise:
    if watch is None:
        return denoise

    def seen(x: Tensor, level: Level) -> Heads:
        estimate = denoise(x, level)
        watch(x, level, estimate)
        return estimate

    return seen
