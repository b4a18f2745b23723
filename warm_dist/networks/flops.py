"""Floating-point operations of a training step, counted from the network itself, and what a device can do at most."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from warm_dist.config.run import Config
from warm_dist.networks.blocks import Block
from warm_dist.networks.unet import NUM_AUGMENT, build, num_parameters

# (part of the device's name, dense bf16, dense TF32), operations a second without sparsity; the first match counts.
# Source: NVIDIA's data sheets of each product, which print the double, with sparsity, for the tensor cores.
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
    """Of a config's network: trainable numbers, residual blocks, operations of one image's forward and backward."""

    parameters: int
    blocks: int
    flops: int


def size_of(config: Config) -> NetworkSize:
    """Counted on the meta device. See `flops_per_image` for what counts as an operation."""
    with torch.device("meta"):
        network = build(config)
    blocks = sum(isinstance(module, Block) for module in network.modules())
    return NetworkSize(num_parameters(network), blocks, flops_per_image(config))


def flops_per_image(config: Config) -> int:
    """Operations of one image's forward and backward: 2 a multiply-add, the backward twice the forward.

    Matrix products and convolutions of the network, attention included; no element-wise work, no loss, and nothing
    that activation checkpointing does again. Counted on the meta device: no memory, tenths of a second.
    """
    data = config.data
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = build(config).eval().to("meta")  # a fixed buffer that numpy drew is not on it yet
        # attention has no fused kernel there: it falls into the two products that are counted
        network(
            torch.empty(1, data.channels, data.resolution, data.resolution),
            torch.empty(1),
            torch.empty(1),
            None,
            torch.empty(1, NUM_AUGMENT),
        )
    return 3 * int(counter.get_total_flops())


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Operations a second of one device: parallel.peak_flops, else the data sheet's, else None.

    fp32 is held against TF32, in which torch lets cuDNN compute float32 convolutions.
    """
    if config.parallel.peak_flops is not None:
        return config.parallel.peak_flops
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device), config.parallel.precision)


def known_peak(name: str, precision: str) -> float | None:
    """The data sheet's figure for a device's name, such as "NVIDIA H100 80GB HBM3"; None if it is not in the table."""
    for part, bf16, tf32 in PEAKS:
        # whole words: an "A10" is in every "A100", an "L4" in every "L40S"
        if f" {part} " in f" {name.replace('-', ' ')} ":
            return bf16 if precision == "bf16" else tf32
    return None
