"""Run by test_engines.py in real processes: every engine, stage and checkpoint case of one world size, results as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipelines.store import open_store
from warm_dist import checkpoint, distributed, rng
from warm_dist.config import Config
from warm_dist.config_file import validate
from warm_dist.distributed import World
from warm_dist.ema import EMA, half_life
from warm_dist.engine import build_engine
from warm_dist.errors import NumericsError, OutputError, Stopped
from warm_dist.metrics import MetricsLog, read_metrics
from warm_dist.networks import build
from warm_dist.storage import Storage
from warm_dist.trainer import Trainer
from warm_dist.types import Batch, DataInfo

BATCH, STEPS = 8, 20


def config(output: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "output": str(output),
        "engine": "deepspeed",
        "data": {"manifest": "unused", "resolution": 8, "num_lanes": BATCH},
        "process": {"bnr": 0.5},
        "network": {
            "arch": "ddpmpp",
            "channels": 16,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "attention_resolutions": [4],
        },
        "train": {
            "total_nimg": BATCH * STEPS,
            "batch_size": BATCH,
            "lr": 1e-3,
            "lr_ramp_nimg": BATCH * 4,
            "eps": 1e-4,  # Adam's step is then smooth in the gradient, and rounding does not grow through its sign
            "clip": 1.0,
            "horizontal_flips": True,
            "ema_half_life_nimg": 100,
            "log_nimg": BATCH,
            "save_nimg": BATCH * 10,
        },
    }
    for path, value in changes.items():
        section, key = path.split("__") if "__" in path else (None, path)
        (tree if section is None else tree.setdefault(section, {}))[key] = value
    return validate(tree)


def info() -> DataInfo:
    spectrum = np.full((8, 8), 0.25)
    low = np.zeros(48), 0.25 * np.eye(48)
    return DataInfo(8, 3, 0, 64, np.zeros(3), np.zeros((3, 8, 8)), spectrum, 0.5, *low, "synthetic")


def batches(world: World, nimg: int, poison: int | None = None) -> Iterator[Batch]:
    """Image p is noise drawn from p: the same at every world size. `poison`: from there on images are out of range."""
    while True:
        share = BATCH // world.size
        positions = np.arange(nimg + world.rank * share, nimg + (world.rank + 1) * share)
        images = np.stack(
            [rng.generator(1, "image", int(p)).integers(0, 256, (3, 8, 8), dtype=np.uint8) for p in positions]
        )
        yield Batch(images, np.full(share, -1), positions, tuple(f"image{p}" for p in positions))
        nimg += BATCH


def train(world: World, settings: Config, until: int | None = None) -> tuple[Trainer, list[float]]:
    """Train from the newest checkpoint of the run (or from scratch); the losses of all its lines."""
    run = Path(settings.output)
    run.mkdir(parents=True, exist_ok=True)
    storage = Storage(run, world, open_store, settings.checkpoint, print)
    trainer = Trainer(settings, world, info(), lambda text: None, storage)
    trainer.restore()
    log = MetricsLog(run / "metrics.jsonl", 1) if world.is_main else None
    stop = distributed.StopSignal()
    if until is not None:
        step = trainer.step

        def counted(data: Any) -> Any:
            trace = step(data)
            if trainer.nimg == until and world.rank == world.size - 1:
                stop.name = "TEST"  # one rank asks, all must stop
            return trace

        trainer.step = counted  # type: ignore[method-assign]
    with contextlib.suppress(Stopped):
        trainer.fit(batches(world, trainer.nimg), log, stop, None, set())
    losses = [r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"] if world.is_main else []
    return trainer, losses


def state_digest(world: World, trainer: Trainer) -> list[float]:
    """Sums that are equal only if master weights, both moments and the EMA are, over all ranks."""
    sums = torch.zeros(4, dtype=torch.float64)
    for fragment, value in zip(trainer.engine.owned(), trainer.emas["ema"].values, strict=True):
        for k, tensor in enumerate((fragment.master, fragment.exp_avg, fragment.exp_avg_sq, value)):
            place = torch.arange(fragment.start, fragment.start + fragment.numel, dtype=torch.float64)
            sums[k] += (tensor.double() * torch.cos(place)).sum()
    dist.all_reduce(sums)
    return sums.tolist()


def engines(world: World, root: Path) -> dict[str, Any]:
    out = {}
    for name, changes in {
        "local": {"engine": "local"},
        "zero0": {"parallel__zero_stage": 0},
        "zero1": {"parallel__zero_stage": 1},
        "zero2": {"parallel__zero_stage": 2},
        "zero3": {"parallel__zero_stage": 3},
        "zero1-accumulate": {"parallel__zero_stage": 1, "train__micro_batch_size": 2},
        "zero2-accumulate": {"parallel__zero_stage": 2, "train__micro_batch_size": 2},
        "zero1-recompute": {"parallel__zero_stage": 1, "parallel__activation_checkpointing": True},
        "zero3-recompute": {"parallel__zero_stage": 3, "parallel__activation_checkpointing": True},
        "zero0-bf16": {"parallel__zero_stage": 0, "parallel__precision": "bf16"},
        "zero1-bf16": {"parallel__zero_stage": 1, "parallel__precision": "bf16"},
    }.items():
        if world.size == 1 and "-" in name:
            continue  # two ranks show it
        trainer, losses = train(world, config(root / f"{name}-{world.size}", **changes))
        elements = torch.tensor([sum(f.numel for f in trainer.engine.owned())])
        dist.all_reduce(elements)
        out[name] = {
            "losses": losses,
            "elements": int(elements),
            "held": sum(f.numel for f in trainer.engine.fragments()),
            "digest": state_digest(world, trainer),
        }
    return out


def interrupted(world: World, root: Path) -> dict[str, Any]:
    """Stopped by one rank's signal between two log lines and resumed, at every stage: equal to the unbroken run."""
    out = {}
    for stage in range(4):
        changes = {"parallel__zero_stage": stage, "network__dropout": 0.1, "train__log_nimg": BATCH * 3}
        changes["train__total_nimg"] = BATCH * 12
        unbroken, expected = train(world, config(root / f"whole{stage}-{world.size}", **changes))
        broken = config(root / f"broken{stage}-{world.size}", **changes)
        first, _ = train(world, broken, until=BATCH * 7)
        second, losses = train(world, broken)
        out[str(stage)] = {
            "stopped_at": first.nimg,
            "expected": expected,
            "losses": losses,
            "digests": [state_digest(world, unbroken), state_digest(world, second)],
        }
    return out


def elastic(world: World, root: Path, saved_by: int) -> dict[str, Any]:
    """Take up at every stage what a run of `saved_by` ranks at stage 1 saved in mid-run; losses of the rest."""
    out = {}
    for stage in range(4):
        target = root / f"elastic{stage}-{saved_by}-{world.size}"
        if world.is_main:
            import shutil

            shutil.copytree(root / f"zero1-{saved_by}", target)
            shutil.rmtree(target / checkpoint.name_of(checkpoint.CHECKPOINTS, BATCH * STEPS))
            (target / "metrics.jsonl").unlink()
        distributed.barrier(world, "copy")
        _, losses = train(world, config(target, parallel__zero_stage=stage))
        out[str(stage)] = losses
    return out


def non_finite(world: World, root: Path) -> dict[str, Any]:
    """One rank's sample turns NaN: every rank raises, naming it, and no weight has moved since the step before."""
    out = {}
    for name, changes in {
        "local": {"engine": "local"},
        **{f"zero{s}": {"parallel__zero_stage": s} for s in range(4)},
    }.items():
        settings = config(root / f"nan-{name}-{world.size}", **changes)
        trainer = Trainer(settings, world, info(), lambda text: None)
        stop = distributed.StopSignal()
        prepared, step = [], trainer.step

        def poisoned(data: Any, step: Any = step, trainer: Trainer = trainer, prepared: list[Any] = prepared) -> Any:
            if trainer.nimg >= BATCH * 3:
                if not prepared:
                    prepared.append(state_digest(world, trainer)[0])
                if world.rank == world.size - 1:
                    data.x0[0] = float("nan")
            return step(data)

        trainer.step = poisoned  # type: ignore[method-assign]
        try:
            trainer.fit(batches(world, 0), None, stop, None, set())
            message = "nothing raised"
        except NumericsError as error:
            message = str(error)
        out[name] = {
            "message": message,
            "moved": abs(state_digest(world, trainer)[0] - prepared[0]),
            "nimg": trainer.nimg,
        }
    return out


def collectives(world: World, root: Path) -> dict[str, Any]:
    def fail() -> None:
        raise OutputError("rank 0 says no")

    try:
        distributed.on_main(world, fail)
        caught = "nothing"
    except OutputError as error:
        caught = str(error)
    return {
        "on_main": distributed.on_main(world, lambda: "from 0"),
        "caught": distributed.gather(world, caught),
        "any": distributed.any_rank(world, world.rank == world.size - 1),
        "none": distributed.any_rank(world, False),
    }


def ema_whole(world: World, root: Path) -> float:
    """The sharded EMA, gathered, against a plain EMA of whole weights: the largest difference."""
    settings = config(root / "ema", parallel__zero_stage=2)
    torch.manual_seed(0)
    network = build(settings)
    shapes = {name: p.shape for name, p in network.named_parameters()}
    engine = build_engine(network, settings, world)
    decay = partial(half_life, 100, 0.05)
    ema = EMA(engine.owned(), decay)
    plain = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    for k in range(1, 6):
        for fragment in engine.owned():
            fragment.master.add_(torch.arange(fragment.start, fragment.start + fragment.numel), alpha=1e-4)
        engine.loaded(k)
        beta = decay(k * BATCH, BATCH)
        ema.update(k * BATCH, BATCH)
        for name, p in engine.module.named_parameters():
            plain[name] = beta * plain[name] + (1 - beta) * p.detach()
    full = ema.full(world, shapes)
    return max(float((full[name] - plain[name]).abs().max() / plain[name].abs().max()) for name in plain)


def main() -> None:
    root, saved_by = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    world = distributed.init(60)
    results: dict[str, Any] = {"engines": engines(world, root)}
    if world.size > 1:
        cases = {"interrupted": interrupted, "non_finite": non_finite, "collectives": collectives, "ema": ema_whole}
        results |= {name: case(world, root) for name, case in cases.items()}
    if saved_by:
        results["elastic"] = elastic(world, root, saved_by)
    if world.is_main:
        (root / f"results-{world.size}.json").write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main()
