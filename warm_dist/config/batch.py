"""Batch arithmetic: how a global batch is shared among ranks, lanes and accumulations."""

from __future__ import annotations

from warm_dist.config.run import Config
from warm_dist.errors import ConfigError, WorldSizeError


def micro_batches(config: Config, world_size: int) -> tuple[int, int]:
    """(images per rank and backward, number of accumulations): batch_size = ranks × micro-batch × accumulations."""
    per_rank = config.train.batch_size // world_size
    micro = config.train.micro_batch_size or per_rank
    return micro, per_rank // micro


def check_world_size(config: Config, size: int) -> None:
    """Check that `size` ranks can share batch, lanes and micro-batches evenly.

    Raises WorldSizeError, which lists the valid sizes, ConfigError if micro-batches do not fit the batch.
    """
    batch, lanes, micro = config.train.batch_size, config.data.num_lanes, config.train.micro_batch_size
    if micro and batch % micro:
        raise ConfigError(f"train.batch_size {batch} is not a multiple of train.micro_batch_size {micro}")
    valid = [n for n in range(1, lanes + 1) if lanes % n == 0 and (not micro or (batch // n) % micro == 0)]
    if size not in valid:
        raise WorldSizeError(
            f"{size} processes cannot share train.batch_size {batch} in data.num_lanes {lanes} lanes"
            f"{f' by train.micro_batch_size {micro}' if micro else ''}; valid world sizes: {', '.join(map(str, valid))}"
        )


def batch_equation(config: Config, size: int) -> str:
    """The batch arithmetic as one line of text."""
    micro, accumulation = micro_batches(config, size)
    return (
        f"batch {config.train.batch_size} = {size} ranks x {micro} images x {accumulation} accumulations; "
        f"{config.train.total_nimg:,} images = {config.train.total_nimg // config.train.batch_size:,} steps"
    )


def check_lanes(batch_size: int, num_lanes: int, world: int) -> None:
    """Check that lanes divide the batch and ranks the lanes. Raises WorldSizeError, which lists the valid sizes."""
    if batch_size % num_lanes:
        raise WorldSizeError(f"train.batch_size {batch_size} is not a multiple of data.num_lanes {num_lanes}")
    if world < 1 or num_lanes % world:
        valid = ", ".join(str(size) for size in range(1, num_lanes + 1) if num_lanes % size == 0)
        raise WorldSizeError(f"{world} processes cannot share data.num_lanes {num_lanes} evenly; valid sizes: {valid}")
