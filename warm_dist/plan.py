"""What a run will need, computed before any GPU or data is touched: batch arithmetic, parameters, memory per ZeRO stage."""

from __future__ import annotations

import json

import torch

from warm_dist.config import Config
from warm_dist.config_file import dump
from warm_dist.engine import micro_batches
from warm_dist.errors import ConfigError, WorldSizeError
from warm_dist.networks import build, num_parameters


def check_world_size(config: Config, size: int) -> None:
    """Raises WorldSizeError, listing the legal sizes, unless batch and lanes can be dealt evenly to `size` ranks."""
    batch, lanes, micro = config.train.batch_size, config.data.num_lanes, config.train.micro_batch_size
    if micro and batch % micro:
        raise ConfigError(f"train.batch_size {batch} is not a multiple of train.micro_batch_size {micro}")
    legal = [n for n in range(1, lanes + 1) if lanes % n == 0 and (not micro or (batch // n) % micro == 0)]
    if size not in legal:
        raise WorldSizeError(
            f"{size} processes cannot share train.batch_size {batch} in data.num_lanes {lanes} lanes"
            f"{f' by train.micro_batch_size {micro}' if micro else ''}; legal world sizes: {', '.join(map(str, legal))}"
        )


def batch_equation(config: Config, size: int) -> str:
    """The batch arithmetic as one line."""
    micro, accumulation = micro_batches(config, size)
    return (
        f"batch {config.train.batch_size} = {size} ranks x {micro} images x {accumulation} accumulations; "
        f"{config.train.total_nimg:,} images = {config.train.total_nimg // config.train.batch_size:,} steps"
    )


def memory_bytes(parameters: int, size: int, stage: int, precision: str) -> int:
    """Bytes of weights, gradients, Adam and EMA per rank (activations not counted). Source: ZeRO (arXiv 1910.02054), section 5.

    Stage 0 keeps float32 weights and gradients; above it a float32 master partition stands beside the forward weights.
    """
    shard = parameters / size
    forward = 2 if precision == "bf16" and stage else 4
    weights = forward * (shard if stage == 3 else parameters)
    gradients = forward * (shard if stage >= 2 else parameters)
    adam = 8 * (shard if stage else parameters)
    master = 4 * shard if stage else 0
    return int(weights + gradients + adam + master + 4 * shard)


def dry_run(config: Config, size: int) -> str:
    """The text of `launch/train.py --dry-run`."""
    check_world_size(config, size)
    with torch.device("meta"):
        network = build(config)
    parameters = num_parameters(network)
    lines = [
        json.dumps(dump(config), indent=2),
        batch_equation(config, size),
        f"parameters: {parameters:,} ({parameters / 1e6:.1f} M)",
        f"memory per rank without activations, {size} ranks, {config.parallel.precision}:",
    ]
    for stage in range(4):
        chosen = (
            "  <- parallel.zero_stage" if stage == config.parallel.zero_stage and config.engine == "deepspeed" else ""
        )
        size_gib = memory_bytes(parameters, size, stage, config.parallel.precision) / 2**30
        lines.append(f"  ZeRO {stage}: {size_gib:8.3f} GiB{chosen}")
    return "\n".join(lines)
