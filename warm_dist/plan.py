"""What a run will need, computed before any GPU or data is touched: batch arithmetic, parameters, memory per ZeRO stage."""

from __future__ import annotations

import json

from warm_dist.config import Config
from warm_dist.config_file import dump
from warm_dist.engine import micro_batches
from warm_dist.errors import ConfigError, WorldSizeError
from warm_dist.flops import size_of
from warm_dist.scaling import memory_bytes


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


def dry_run(config: Config, size: int) -> str:
    """The text of `launch/train.py --dry-run`."""
    check_world_size(config, size)
    network, parallel = size_of(config), config.parallel
    parameters, emas = network.parameters, 1 + len(config.train.ema_lengths)
    lines = [
        json.dumps(dump(config), indent=2),
        batch_equation(config, size),
        f"parameters: {parameters:,} ({parameters / 1e6:.1f} M)",
        f"operations: {network.flops / 1e9:.1f} GFLOP per image, forward and backward",
        f"memory per rank without activations, {size} ranks, {parallel.precision}"
        f"{', optimizer on the host' if parallel.offload_optimizer else ''}:",
    ]
    for stage in range(4):
        chosen = "  <- parallel.zero_stage" if stage == parallel.zero_stage and config.engine == "deepspeed" else ""
        offload = parallel.offload_optimizer and stage > 0
        size_gib = memory_bytes(parameters, size, stage, parallel.precision, emas, offload) / 2**30
        lines.append(f"  ZeRO {stage}: {size_gib:8.3f} GiB{chosen}")
    return "\n".join(lines)
