"""The needs of a run without running it: batch arithmetic, parameters, operations, memory per ZeRO stage."""

from __future__ import annotations

import json

from warm_dist.config.batch import batch_equation, check_world_size
from warm_dist.config.load import dump
from warm_dist.config.run import Config


def forward_bytes(stage: int, precision: str) -> int:
    """Bytes of a forward weight or its gradient; at stage 0 the network casts float32 weights."""
    return 2 if precision == "bf16" and stage else 4


def memory_bytes(
    parameters: int, size: int, stage: int, precision: str, num_emas: int = 1, offload: bool = False
) -> int:
    """Bytes of weights, gradients, Adam and EMAs on a rank's device, without activations.

    Stage 0 has float32 weights and gradients; higher stages add a float32 master partition to the forward weights.
    offload: master weights, Adam and EMAs are on the host. Source: ZeRO (arXiv 1910.02054), section 5.
    """
    shard, each = parameters / size, forward_bytes(stage, precision)
    weights = each * (shard if stage == 3 else parameters)
    gradients = each * (shard if stage >= 2 else parameters)
    adam = 8 * (shard if stage else parameters)
    master = 4 * shard if stage else 0
    state = 0 if offload else adam + master + 4 * num_emas * shard
    return int(weights + gradients + state)


def dry_run(config: Config, size: int) -> str:
    """The text of `launch/train.py --dry-run`."""
    from warm_dist.networks.flops import size_of

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
