"""Floating-point operations of a training step, counted on the network itself, and the peak of known devices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from warm_dist.config.run import Config
from warm_dist.networks.unet import NUM_AUGMENT, build, num_parameters

# (part of the device's name, dense bf16, dense TF32), operations per second; the first match counts.
# Source: NVIDIA's data sheet of each product, whose tensor-core figures with sparsity are twice these.
PEAKS = (
    ("H200 NVL", 835.5e12, 417.5e12),
    ("H200", 989.4e12, 494.7e12),
    ("H100 NVL", 835.5e12, 417.5e12),
    ("H100 PCIe", 756e12, 378e12),
    ("H100", 989.4e12, 494.7e12),
    ("A100", 312e12, 156e12),
    ("L40S", 362e12, 183e12),
    ("A10", 125e12, 62.5e12),
    ("L4", 121e12, 60e12),
)


class NetworkSize(NamedTuple):
    """A network's trainable numbers, and operations per image, forward and backward."""

    parameters: int
    flops: int


def size_of(config: Config) -> NetworkSize:
    """The size of a config's network, counted on the meta device as in `flops_per_image`."""
    with torch.device("meta"):
        network = build(config)
    return NetworkSize(num_parameters(network), flops_per_image(config))


def flops_per_image(config: Config) -> int:
    """Operations per image, forward and backward: 2 per multiply-add, and the backward twice the forward.

    Counts the network's matrix products, convolutions and attention; not element-wise work, the loss, or recomputation
    by activation checkpointing. Runs on the meta device: no memory, tenths of a second.
    """
    data = config.data
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = build(config).eval().to("meta")  # moves the buffer that numpy drew
        # attention has no fused kernel on this device, so its two matrix products are counted
        x = torch.empty(1, data.channels, data.resolution, data.resolution)
        network(x, torch.empty(1), torch.empty(1), None, torch.empty(1, NUM_AUGMENT))
    return 3 * int(counter.get_total_flops())


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Peak operations per second of one device: parallel.peak_flops, else the data sheet's, else None.

    fp32 is compared with TF32, in which cuDNN computes float32 convolutions by default.
    """
    if config.parallel.peak_flops is not None:
        return config.parallel.peak_flops
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device), config.parallel.precision)


def known_peak(name: str, precision: str) -> float | None:
    """The data sheet's peak for a device's name, such as "NVIDIA H100 80GB HBM3"; None if it is not in the table."""
    for part, bf16, tf32 in PEAKS:
        # whole words: "A10" is part of "A100", "L4" of "L40S"
        if f" {part} " in f" {name.replace('-', ' ')} ":
            return bf16 if precision == "bf16" else tf32
    return None
