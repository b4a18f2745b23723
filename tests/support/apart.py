"""Run by test_apart.py: two ranks that share no folder, as on two machines, with and without a store; results as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_run import BATCH, batches, config, info, state_digest
from warm_dist.checkpoints import manager
from warm_dist.checkpoints.format import CHECKPOINTS, SNAPSHOTS, complete_names
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.data import Batch
from warm_dist.distributed.collectives import gather
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World, join, shutdown
from warm_dist.errors import ConfigError
from warm_dist.runs.metrics import MetricsLog, read_metrics
from warm_dist.store.open import open_store
from warm_dist.training.trainer import Trainer


def train(world: World, root: Path, machine: str, steps: int) -> dict[str, Any]:
    output = root / f"{machine}{world.rank}"
    settings = config(
        output,
        train__total_nimg=BATCH * steps,
        train__save_nimg=BATCH * 4,
        train__ema_lengths=[0.1],
        train__snapshot_nimg=BATCH * 8,
        checkpoint__url=str(root / "store"),
        checkpoint__keep_last=1,
    )
    storage = CheckpointManager(output, world, settings.checkpoint, print)
    trainer = Trainer(settings, world, info(), lambda text: None, storage)
    trainer.restore()
    begin, save = trainer.nimg, trainer.save

    def in_turn() -> None:
        """What was saved before is in the store, however slow that is: so its files are there to be removed."""
        assert storage.uploads
        while storage.uploads.pending():
            time.sleep(0.01)
        save()

    trainer.save = in_turn  # type: ignore[method-assign]
    log = MetricsLog(output / "metrics.jsonl", 1) if world.is_main else None
    trainer.fit(batches(world, trainer.nimg), log, StopSignal(), None, set())
    late = [upload.error for upload in storage.close(20)]
    records = read_metrics(output / "metrics.jsonl") if world.is_main else []
    return {
        "begin": begin,
        "shared": storage.shared,
        "late": gather(world, late),
        "losses": [r["loss"] for r in records if r["kind"] == "train"],
        "digest": state_digest(world, trainer),
    }


def slow(world: World, root: Path) -> list[str]:
    """What is said when rank 1 waits for its data."""
    said: list[str] = []
    settings = config(root / "slow", train__total_nimg=BATCH * 10, train__log_nimg=BATCH * 10)

    def late() -> Iterator[Batch]:
        for batch in batches(world, 0):
            time.sleep(0.3 * world.rank)
            yield batch

    Trainer(settings, world, info(), said.append).fit(late(), None, StopSignal(), None, set())
    return said


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    manager._VISIBLE_S = 1.0  # these folders never become visible, and each rank would wait for that
    world = join(60)
    results: dict[str, Any] = {}
    try:
        CheckpointManager(root / f"alone{world.rank}", world, config(root).checkpoint, print)
    except ConfigError as error:
        results["refused"] = str(error)
    results["first"] = train(world, root, "machine", 12)
    results["second"] = train(world, root, "other machine", 20)
    results["whole"] = train(world, root / "whole", "machine", 20)
    results["slow"] = slow(world, root)
    if world.is_main:
        store = open_store(str(root / "store"), None)
        results["names"] = complete_names(store, CHECKPOINTS)
        results["snapshots"] = complete_names(store, SNAPSHOTS)
        (root / "results.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
