"""Each rank's part of tests/integration/test_memory.py: what a real step takes, and what was predicted.

    python memory_worker.py FOLDER

Rank 0 writes FOLDER/peaks.json: by case, both in bytes.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from tests.support.tiny_run import batches, config, info
from warm_dist.config.batch import micro_batches
from warm_dist.config.run import Config
from warm_dist.distributed.world import World, join, shutdown
from warm_dist.networks.memory import Meter
from warm_dist.training.dry_run import forward_bytes, forward_dtype, memory_bytes, passes, peak_bytes
from warm_dist.training.inputs import prepare
from warm_dist.training.trainer import Trainer

CASES = {
    f"{stage}-{precision}-{name}": {
        "engine": "local" if stage is None else "deepspeed",
        "parallel__zero_stage": stage or 0,
        "parallel__precision": precision,
        "network__channels": 32,
        **changes,
    }
    for stage in (None, 0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    for name, changes in (
        ("once", {}),
        ("accumulate", {"train__micro_batch_size": 4}),
        ("recompute", {"parallel__activation_checkpointing": True}),
    )
}


def real(settings: Config, world: World, stage: int) -> int:
    """The state, by hand, and the most that a step takes beside it, of the step's real tensors."""
    trainer, source = Trainer(settings, world, info(), lambda text: None), batches(world, 0)
    for _ in range(2):  # stage 3 learns the order of its weights in the first
        trainer.step(prepare(next(source), settings, info(), world.device))
    data = prepare(next(source), settings, info(), world.device)
    gc.collect()
    with Meter(o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)) as meter:
        trainer.step(data)
    number, each = (
        sum(shape.numel() for shape in trainer.shapes.values()),
        forward_bytes(stage, settings.parallel.precision),
    )
    state = memory_bytes(number, world.size, stage, settings.parallel.precision)
    # between steps only stage 3 has gradients, and a bucket for all of them
    between = each * number if stage == 3 else -each * (number // world.size if stage == 2 else number)
    return state + between + max(meter.history)[0]


def main(folder: Path) -> None:
    world = join(60)
    out = {}
    for name, changes in CASES.items():
        settings = config(folder / name, **changes)
        stage = settings.parallel.zero_stage if settings.engine == "deepspeed" else None
        images = micro_batches(settings, world.size)[0]
        measured = passes(settings, images, forward_dtype(settings, stage), "cpu")
        out[name] = real(settings, world, stage or 0), peak_bytes(settings, world.size, stage, measured)
    if world.is_main:
        (folder / "peaks.json").write_text(json.dumps(out))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
