"""Images from a network: the same noise for image k at any world size and batch size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from warm_dist import checkpoint, rng
from warm_dist.config import Config, SamplerConfig, parse_json, validate
from warm_dist.errors import CheckpointError, NumericsError
from warm_dist.networks import UNet
from warm_dist.precond import data_spectrum, heads
from warm_dist.process import constant_bnr
from warm_dist.sampler import SAMPLERS, edm_grid, start
from warm_dist.types import DataInfo, Heads, Level


def centre(images: Tensor, channel_mean: Tensor) -> Tensor:
    """(B, C, H, W) uint8 → float32 in [-1, 1] less the data set's channel means (C,)."""
    return images.float() / 127.5 - 1 - channel_mean[:, None, None].float()


def to_uint8(x: Tensor, channel_mean: Tensor) -> Tensor:
    """The inverse of `centre`, rounded and clipped to 0 … 255."""
    return ((x + channel_mean[:, None, None].to(x)) * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def sample_labels(seed: int, indices: Sequence[int], num_classes: int) -> NDArray[np.int64]:
    """A uniformly drawn class for each image, -1 without classes."""
    if not num_classes:
        return np.full(len(indices), -1, np.int64)
    return np.array(
        [int(rng.generator(seed, "sample label", index).integers(num_classes)) for index in indices], np.int64
    )


@torch.inference_mode()
def generate(
    network: nn.Module,
    config: Config,
    info: DataInfo,
    indices: Sequence[int],
    labels: NDArray[np.int64],
    *,
    seed: int,
    device: torch.device,
    batch_size: int,
    sampler: SamplerConfig | None = None,
    bnr: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> NDArray[np.uint8]:
    """Images number `indices` of the stream `seed`, (len(indices), C, H, W) uint8.

    labels: (len(indices),), -1 for none. sampler, bnr: instead of the config's. Raises NumericsError for a non-finite
    image.
    """
    options, ratio = sampler or config.sampler, config.process.bnr if bnr is None else bnr
    network.eval()
    path = constant_bnr(ratio)
    sigmas = [*edm_grid(options.num_steps, options.sigma_min, options.sigma_max, options.rho), 0.0]
    spectrum = data_spectrum(info, config.process.sigma_data).to(device)
    channel_mean = torch.tensor(info.channel_mean, device=device)
    fitted = info if options.start == "measured" else None
    shape = (info.channels, info.resolution, info.resolution)
    out = np.empty((len(indices), *shape), np.uint8)
    for low in range(0, len(indices), batch_size):
        part = list(indices[low : low + batch_size])
        given = torch.from_numpy(labels[low : low + batch_size]).to(device)

        def denoise(x: Tensor, level: Level, given: Tensor = given) -> Heads:
            return heads(network, spectrum, x, level, given)

        noise = torch.from_numpy(rng.normals(seed, "sample", part, shape)).double().to(device)
        x = start(noise, sigmas[0], path(sigmas[0]), fitted)
        x = SAMPLERS[options.method](denoise, x, sigmas, path)
        if not bool(torch.isfinite(x).all()):
            raise NumericsError(f"sampling gave a non-finite image among numbers {part[0]} to {part[-1]}")
        out[low : low + len(part)] = to_uint8(x, channel_mean).cpu().numpy()
        progress(len(part))
    return out


def build_network(config: Config) -> UNet:
    """The config's network, weights drawn from train.seed: equal on every rank and device."""
    rng.seed_torch(config.train.seed, 0, 0)
    return UNet(config.network, config.data.resolution, config.data.channels, config.data.num_classes)


def export_weights(folder: Path, kind: str, path: Path) -> None:
    """Write a checkpoint's "ema" or "master" weights as one safetensors file that `load_weights` needs nothing besides.

    Raises CheckpointError if the checkpoint is damaged, OutputError if the file cannot be written.
    """
    meta = checkpoint.inspect(folder)
    config = validate(meta["config"], str(folder))
    with torch.device("meta"):
        network = UNet(config.network, config.data.resolution, config.data.channels, config.data.num_classes)
    shapes = {name: p.shape for name, p in network.named_parameters()}
    header = {"config": json.dumps(meta["config"]), "data": json.dumps(meta["data"]), "nimg": str(meta["nimg"])}
    checkpoint.export(folder, meta, kind, shapes, path, header)


def load_weights(path: Path) -> tuple[UNet, Config, DataInfo]:
    """A network from a weights file alone, on the CPU, in evaluation mode. Raises CheckpointError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        config = validate(parse_json(metadata["config"], str(path)), str(path))
        info = DataInfo.from_json(json.loads(metadata["data"]))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise CheckpointError(f"{path}: not made by launch/export.py (no config inside)") from None
    network = UNet(config.network, config.data.resolution, config.data.channels, config.data.num_classes)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit its own config ({str(error).splitlines()[-1].strip()})") from None
    return network.eval(), config, info
