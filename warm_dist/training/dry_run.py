"""The needs of a run without running it: batch arithmetic, parameters, operations, memory per ZeRO stage."""

from __future__ import annotations

import json

from warm_dist.config.batch import batch_equation, check_world_size, micro_batches
from warm_dist.config.load import dump
from warm_dist.config.run import Config


def dry_run(config: Config, size: int) -> str:
    """The text of `launch/train.py --dry-run`."""
    from warm_dist.networks.flops import size_of

    check_world_size(config, size)
    network = size_of(config)
    return "\n".join(
        [
            json.dumps(dump(config), indent=2),
            batch_equation(config, size),
            f"parameters: {network.parameters:,} ({network.parameters / 1e6:.1f} M)",
            f"operations: {network.flops / 1e9:.1f} GFLOP per image, forward and backward",
            *_memory(config, size, network.parameters),
        ]
    )


def _memory(config: Config, size: int, parameters: int) -> list[str]:
    """Lines of the peak memory on a GPU, by engine and stage."""
    from warm_dist.training.memory import forward_dtype, memory_bytes, passes, peak_bytes

    parallel, micro = config.parallel, micro_batches(config, size)[0]
    compiled, chosen = parallel.compile is not False, parallel.zero_stage if config.engine == "deepspeed" else None
    stages = (None,) if chosen is None else range(4)
    # a compiled block casts its weights where it needs them, so that one run is good for every stage
    dtypes = {forward_dtype(config, chosen if compiled else stage) for stage in stages}
    measured = {dtype: passes(config, micro, dtype, compiled=compiled) for dtype in dtypes}
    lines = [
        f"peak memory per rank on a GPU, {size} ranks, {micro} images, {parallel.precision}, "
        f"{'compiled' if compiled else 'not compiled'}{', recomputing activations' * parallel.activation_checkpointing}"
        f"{', optimizer on the host' * parallel.offload_optimizer}, GiB:",
        "            state  activations, buffers  total",
    ]
    for stage in stages:
        dtype = forward_dtype(config, chosen if compiled else stage)
        emas, offload = 1 + len(config.train.ema_lengths), parallel.offload_optimizer and bool(stage)
        state = memory_bytes(parameters, size, stage or 0, parallel.precision, emas, offload) / 2**30
        total = peak_bytes(config, size, stage, measured[dtype]) / 2**30
        name = "local " if stage is None else f"ZeRO {stage}"
        mark = "  <- parallel.zero_stage" if stage is not None and stage == chosen else ""
        lines.append(f"  {name}: {state:8.3f} {total - state:21.3f} {total:6.2f}{mark}")
    return lines
