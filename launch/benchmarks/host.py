"""What an engine costs the host: `launch/bench.py host`. Tiny tensors, the real number of blocks, one thread of a CPU.

The trainer's own step of EDM's CIFAR-10 network with 8 channels, one image of 16x16: hardly any arithmetic is left, and
what remains is what a GPU would wait for. Engines take turns in one process. And images/s of what a thread prepares ahead.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launch.benchmarks.contenders import ENGINES, PRECISIONS, changed, engine_keys, unlogged
from launch.benchmarks.inputs import rates
from launch.benchmarks.result import ROOT, Spread
from warm_dist import errors
from warm_dist.errors import ConfigError

if TYPE_CHECKING:
    from warm_dist.config.run import Config
    from warm_dist.training.inputs import Prepared
    from warm_dist.training.trainer import Trainer

WARM_UP, STEPS = 5, 8  # steps before the first round, steps a round
TARGETS = {"zero1": 1.1, "zero2": 1.1, "zero3": 1.5}  # times the local engine in the same precision
SMALL = {"data.resolution": 16, "network.channels": 8, "network.attention_resolutions": [16], "train.lr_ramp_nimg": 0}


def settings(engine: str, precision: str, folder: str, changes: list[str]) -> Config:
    """The config that one contender runs."""
    mine = unlogged(1) | SMALL | engine_keys(engine, precision) | {"output": folder}
    return changed(ROOT / "configs" / "cifar10.json", mine, changes)


def measure(names: list[tuple[str, str]], rounds: int, folder: str, changes: list[str]) -> dict[str, list[float]]:
    """Processor time a step, ms, of every round, by "ENGINE PRECISION"."""
    import torch
    from tqdm import tqdm

    from launch.benchmarks.pictures import made_up, prepared
    from warm_dist.distributed.world import join, shutdown
    from warm_dist.training.trainer import Trainer

    torch.set_num_threads(1)
    world = join(60)
    contenders: dict[str, tuple[Trainer, Prepared]] = {}
    for engine, precision in names:
        config = settings(engine, precision, folder, changes)
        trainer, data = Trainer(config, world, made_up(config), lambda text: None), prepared(config, world)
        for _ in range(WARM_UP):
            trainer.step(data)
        contenders[f"{engine} {precision}"] = trainer, data
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), desc="host", disable=None):
        for name, (trainer, data) in contenders.items():
            begun = time.process_time()
            for _ in range(STEPS):
                trainer.step(data)
            found[name].append((time.process_time() - begun) / STEPS * 1e3)
    shutdown()
    return found


def report(found: dict[str, list[float]]) -> dict[str, Any]:
    """What --json prints: ms a step, and each engine's ratio to the local one in the same precision, round by round."""
    ratios = {}
    for name, values in found.items():
        engine, precision = name.split()
        if engine != "local" and (local := found.get(f"local {precision}")):
            ratio = Spread.of([mine / other for mine, other in zip(values, local, strict=True)])
            target = TARGETS.get(engine)
            ratios[name] = asdict(ratio) | {"target": target, "met": target and ratio.median <= target}
    return {"ms": {name: asdict(Spread.of(values)) for name, values in found.items()}, "ratios": ratios}


def table(found: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{'':16}{'ms a step':>12}{'min..max':>18}{'of local':>12}{'min..max':>18}  target"]
    for name, row in found["ms"].items():
        line = f"{name:16}{Spread(**row).columns(1)}"
        if ratio := found["ratios"].get(name):
            line += Spread(ratio["median"], ratio["min"], ratio["max"]).columns(2)
            if ratio["target"]:
                line += f"  {ratio['target']:g}: {'met' if ratio['met'] else 'missed'}"
        lines.append(line)
    lines += ["", f"{'prepared ahead':16}{'images/s':>12}{'min..max':>18}  on one core"]
    lines += [f"{name:16}{Spread(**row).columns(0)}" for name, row in found["inputs"].items()]
    return "\n".join(lines)


def host(args: argparse.Namespace) -> int:
    """The subcommand `host`."""
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds}: at least 1")
    names = [(engine, precision) for precision in args.precisions for engine in args.engines]
    with tempfile.TemporaryDirectory(prefix="warm-dist-bench-") as folder:
        found = report(measure(names, args.rounds, folder, args.set))
    found["inputs"] = {name: asdict(spread) for name, spread in rates(args.rounds).items()}
    print(json.dumps(found) if args.json else table(found))
    return errors.EXIT_OK


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `host`."""
    command.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="default: all")
    command.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="default: both")
    command.add_argument("--rounds", type=int, default=7, help="everything once a round (default: %(default)s)")
    command.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override a key")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=host)
