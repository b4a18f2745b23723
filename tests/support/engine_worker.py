"""Run by test_engines.py in real processes: `engine_worker.py FOLDER LABEL CASE…` writes what the cases gave to LABEL.json."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.support.networks import weight
from tests.support.tiny_run import BATCH, batches, config, info, start, state_digest, steps
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.config.run import Config
from warm_dist.distributed.collectives import any_rank, barrier, gather, on_main
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World, join, shutdown
from warm_dist.errors import NumericsError, OutputError, Stopped
from warm_dist.networks.blocks import Block
from warm_dist.networks.unet import UNet, build
from warm_dist.runs.metrics import MetricsLog, read_metrics
from warm_dist.training import deepspeed_engine
from warm_dist.training.deepspeed_engine import build_engine, deepspeed_config
from warm_dist.training.ema import EMA, half_life
from warm_dist.training.trainer import Trainer

HALF, REST = 8, 4  # runs are saved after so many steps, and others take them up for so many

# Engines are compared on fewer layers than `config` has: ZeRO-3 gathers each of them over and over.
SMALL = {"network__channel_mult": [1], "network__attention_resolutions": [], "train__clip": 0.3}


def train(world: World, settings: Config, until: int | None = None) -> tuple[Trainer, list[float]]:
    """Train from the newest checkpoint of the run (or from scratch); the losses of all its lines."""
    run = Path(settings.output)
    run.mkdir(parents=True, exist_ok=True)
    storage = CheckpointManager(run, world, settings.checkpoint, print)
    trainer = Trainer(settings, world, info(), lambda text: None, storage)
    trainer.restore()
    log = MetricsLog(run / "metrics.jsonl", 1) if world.is_main else None
    stop = StopSignal()
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
    return trainer, logged(settings, "loss") if world.is_main else []


def logged(settings: Config, name: str) -> list[Any]:
    """What the lines of training of a run's metrics.jsonl say under this name."""
    records = read_metrics(Path(settings.output) / "metrics.jsonl")
    return [record[name] for record in records if record["kind"] == "train"]


def bits(world: World, trainer: Trainer) -> list[int]:
    """Of master weights, both moments and the EMA: a sum over every bit pattern times its element's own odd number.

    Integers wrap, so the sum is the same in any order: equal for equal states, whoever holds which part.
    """
    sums = torch.zeros(4, dtype=torch.int64)
    for fragment, value in zip(trainer.engine.shard(), trainer.emas["ema"].values, strict=True):
        place = torch.arange(fragment.start, fragment.start + fragment.numel) * 2 + 1
        place *= 2 * zlib.crc32(fragment.name.encode()) + 1
        for k, tensor in enumerate((fragment.master, fragment.exp_avg, fragment.exp_avg_sq, value)):
            sums[k] += (tensor.contiguous().view(torch.int32).long() * place).sum()
    dist.all_reduce(sums)
    return sums.tolist()


def weights(world: World, trainer: Trainer) -> np.ndarray[Any, Any]:
    """All master weights, one after another."""
    whole = EMA(trainer.engine.shard(), lambda nimg, count: 0.0).full(world, trainer.shapes)
    return torch.cat([value.view(-1) for value in whole.values()]).numpy()


def cases(size: int) -> dict[str, dict[str, Any]]:
    """What is compared at one world size; two ranks do everything."""
    accumulate = {"train__micro_batch_size": BATCH // size // 4}
    out: dict[str, dict[str, Any]] = {"local": {"engine": "local"}}
    out |= {f"zero{stage}": {"parallel__zero_stage": stage} for stage in range(4)}
    for stage in range(4) if size == 2 else (1, 3):
        out[f"zero{stage}-accumulate"] = {"parallel__zero_stage": stage, **accumulate}
    if size == 1:
        out["local-bf16"] = {"engine": "local"}
    if size == 2:
        for stage in range(4):
            out[f"zero{stage}-bf16"] = {"parallel__zero_stage": stage}
        for stage in (1, 2, 3):
            out[f"zero{stage}-offload"] = {"parallel__zero_stage": stage, "parallel__offload_optimizer": True}
        out["zero3-regathered"] = {"parallel__zero_stage": 3}
        for stage in ("1", "3", "3-regathered"):
            out[f"zero{stage}-recompute"] = {
                "parallel__zero_stage": int(stage[0]),
                "parallel__activation_checkpointing": True,
            }
        out["zero1-offload-accumulate"] = out["zero1-offload"] | accumulate
        out["zero1-offload-bf16"] = out["zero1-offload"]
        out["zero2-accumulate-bf16"] = out["zero2-accumulate"]
    for name, changes in out.items():
        changes = {**SMALL, **changes}
        out[name] = changes | {"parallel__precision": "bf16"} if name.endswith("-bf16") else changes
    return out


@contextlib.contextmanager
def keeping(weights: bool) -> Iterator[None]:
    """Inside, engines at stage 3 keep gathered weights for the backward pass, or not, as those of large networks."""
    with mock.patch.object(deepspeed_engine, "KEPT", deepspeed_engine.KEPT if weights else 0):
        yield


def engines(world: World, root: Path, *saved: str) -> dict[str, Any]:
    """Each case from the same start: losses and norms of all steps, and who holds how much.

    saved: cases that leave a checkpoint of their middle, for other world sizes to take up, and its bits.
    """
    out: dict[str, Any] = {}
    for name, changes in cases(world.size).items():
        with keeping("regathered" not in name):
            trainer = start(world, config(root / f"{name}-{world.size}", **changes))
        losses, norms = steps(world, trainer, HALF)
        held = None
        if name in saved:
            trainer.save()
            held = bits(world, trainer)
        losses, norms = (a + b for a, b in zip((losses, norms), steps(world, trainer, REST), strict=True))
        elements = torch.tensor([sum(f.numel for f in trainer.engine.shard())])
        dist.all_reduce(elements)
        out[name] = {
            "losses": losses,
            "norms": norms,
            "bits": held,
            "elements": int(elements),
            "held": sum(f.numel for f in trainer.engine.fragments()),
            "digest": state_digest(world, trainer),
        }
    return out


def compiled(world: World, root: Path) -> dict[str, Any]:
    """A few steps of the network as torch.compile makes it, all ranks in one cache, and what its parameters are called."""
    out, compiling = {}, {"parallel__compile": True, "parallel__compile_cache": str(root / "kernels")}
    for name, changes in {
        "local": {"engine": "local"},
        **{f"zero{s}": {"parallel__zero_stage": s} for s in range(4)},
    }.items():
        trainer = start(world, config(root / f"compiled-{name}", **SMALL, **changes, **compiling))
        losses, _ = steps(world, trainer, 3)
        calls = torch._dynamo.utils.counters["stats"]["calls_captured"]
        out[name] = {"losses": losses, "captured": calls, "names": sorted({f.name for f in trainer.engine.fragments()})}
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    return out


def elastic(world: World, root: Path, stage: str, saved_by: str, *names: str) -> dict[str, Any]:
    """What a run of `saved_by` ranks at `stage` saved, taken up by each case: its bits, and the rest of the losses.

    The weights before and after the first step are left in the folder.
    """
    out = {}
    for name in names:
        target = root / f"elastic-{stage}-{saved_by}-{name}-{world.size}"
        if world.is_main:
            shutil.copytree(root / f"zero{stage}-{saved_by}", target)
        barrier(world, "copy")
        trainer = start(world, config(target, **cases(world.size)[name]))
        found, before = bits(world, trainer), weights(world, trainer)
        losses, _ = steps(world, trainer, 1)
        after = weights(world, trainer)
        if "accumulate" not in name:
            losses += steps(world, trainer, REST - 1)[0]
        if world.is_main:
            np.save(target / "weights.npy", np.stack([before, after]))
        out[name] = {"bits": found, "losses": losses}
    return out


def interrupted(world: World, root: Path) -> dict[str, Any]:
    """Stopped by one rank's signal between two log lines and resumed, at every stage: equal to the unbroken run."""
    out = {}
    for stage in range(4):
        changes = {**SMALL, "parallel__zero_stage": stage, "network__dropout": 0.1, "train__log_nimg": BATCH * 3}
        changes["train__total_nimg"] = BATCH * 12
        whole = config(root / f"whole{stage}-{world.size}", **changes)
        unbroken, expected = train(world, whole)
        broken = config(root / f"broken{stage}-{world.size}", **changes)
        first, _ = train(world, broken, until=BATCH * 7)
        second, losses = train(world, broken)
        out[str(stage)] = {
            "stopped_at": first.nimg,
            "expected": expected,
            "losses": losses,
            "heads": [logged(run, "head_inconsistency") for run in (whole, broken)] if world.is_main else [],
            "digests": [bits(world, unbroken), bits(world, second)],
        }
    return out


def non_finite(world: World, root: Path) -> dict[str, Any]:
    """One rank's sample turns NaN: every rank raises, naming it, and no weight has moved since the step before."""
    out = {}
    for name, changes in {
        "local": {"engine": "local"},
        **{f"zero{s}": {"parallel__zero_stage": s} for s in range(4)},
    }.items():
        settings = config(root / f"nan-{name}-{world.size}", **SMALL, **changes)
        trainer = Trainer(settings, world, info(), lambda text: None)
        stop = StopSignal()
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
        on_main(world, fail)
        caught = "nothing"
    except OutputError as error:
        caught = str(error)
    return {
        "on_main": on_main(world, lambda: "from 0"),
        "caught": gather(world, caught),
        "any": any_rank(world, world.rank == world.size - 1),
        "none": any_rank(world, False),
    }


def ema_whole(world: World, root: Path) -> float:
    """The sharded EMA, gathered, against a plain EMA of whole weights: the largest difference."""
    settings = config(root / "ema", parallel__zero_stage=2)
    torch.manual_seed(0)
    network = build(settings)
    shapes = {name: p.shape for name, p in network.named_parameters()}
    engine = build_engine(network, settings, world)
    decay = partial(half_life, 100, 0.05)
    ema = EMA(engine.shard(), decay)
    plain = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    for k in range(1, 6):
        for fragment in engine.shard():
            fragment.master.add_(torch.arange(fragment.start, fragment.start + fragment.numel), alpha=1e-4)
        engine.after_load(k)
        beta = decay(k * BATCH, BATCH)
        ema.update(k * BATCH, BATCH)
        for name, p in engine.module.named_parameters():
            plain[name] = beta * plain[name] + (1 - beta) * p.detach()
    full = ema.full(world, shapes)
    return max(float((full[name] - plain[name]).abs().max() / plain[name].abs().max()) for name in plain)


def gathered(world: World, root: Path, how: str = "plain") -> dict[str, list[list[bool]]]:
    """At stage 3, weights kept and not: whether something holds the root's and each block's after the forward pass, and
    after the backward pass, in the first, second and third step, between which DeepSpeed learns their order.
    """
    compiling = {"parallel__compile": how == "compiled", "parallel__compile_cache": str(root / "kernels")}
    settings = config(root, **SMALL, parallel__zero_stage=3, **compiling)
    out: dict[str, list[list[bool]]] = {}
    for kept in (True, False):
        with keeping(kept), mock.patch.object(deepspeed_engine, "deepspeed_config", _without_prefetch):
            engine = build_engine(build(settings), settings, world)
        storages = _gathered_storages(engine.module)
        level = torch.zeros(2)
        for _ in range(3):
            storages.clear()
            loss = engine(torch.randn(2, 3, 8, 8), level, level, None).square().mean()
            out.setdefault(f"kept {kept}, forward", []).append(_held(storages))
            engine.backward(loss)
            out.setdefault(f"kept {kept}, backward", []).append(_held(storages))
            engine.step(0.0)
    return out


def _without_prefetch(*given: Any) -> dict[str, Any]:
    found = deepspeed_config(*given)
    found["zero_optimization"]["stage3_prefetch_bucket_size"] = 0  # all of this network would fit into it
    return found


def _gathered_storages(network: UNet) -> list[StorageWeakRef]:
    """Filled in every forward pass: what holds the gathered weights of the root and of each block."""
    storages = []
    for block in network.modules():
        if isinstance(block, Block):

            def compute(flat: Tensor, *given: Tensor, plain: Callable[..., Tensor] = block.compute) -> Tensor:
                storages.append(StorageWeakRef(flat.untyped_storage()))
                return plain(flat, *given)

            block.compute = compute
    embed = network.embed

    def embedded(w: dict[str, Tensor], *given: Any) -> Tensor:
        storages.append(StorageWeakRef(w["stem.weight"].untyped_storage()))
        return embed(w, *given)

    network.embed = embedded
    return storages


def _held(storages: list[StorageWeakRef]) -> list[bool]:
    gc.collect()
    return [not storage.expired() for storage in storages]


def shards(world: World, root: Path) -> dict[str, float]:
    """The masters of all ranks, put together by what the fragments say of themselves, against the weights of the start."""
    out = {}
    for stage in range(4):
        torch.manual_seed(0)
        network = build(config(root, **SMALL))
        network.register_parameter("odd", torch.nn.Parameter(torch.randn(7)))  # stage 3 pads what ranks cannot share
        torch.nn.init.normal_(weight(network, "conv_out.weight"))
        weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        engine = build_engine(network, config(root, **SMALL, parallel__zero_stage=stage), world)
        whole = EMA(engine.shard(), lambda nimg, count: 0.0).full(world, {n: w.shape for n, w in weights.items()})
        out[str(stage)] = max(float((whole[name] - weights[name]).abs().max()) for name in weights)
    return out


def main() -> None:
    root, label, *names = Path(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    world = join(120)
    everything = (engines, compiled, elastic, interrupted, non_finite, collectives, ema_whole, shards, gathered)
    known = {f.__name__: f for f in everything}
    results = {}
    for name in names:
        case, *arguments = name.split("/")
        results[name] = known[case](world, root, *arguments)
    if world.is_main:
        (root / f"{label}.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
