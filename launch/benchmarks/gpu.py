"""What this device does: `launch/bench.py gpu`. The trainer's own step on every engine, sampling, evaluation, and peers.

Everybody takes turns on made-up pictures, within a budget of seconds; what tells most comes first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.benchmarks.contenders import (
    ENGINES,
    PRECISIONS,
    SLACK_S,
    STEPS,
    WARM_UP,
    Contender,
    Peer,
    Rounds,
    changed,
    engine_keys,
    parts_of,
    unlogged,
)
from launch.benchmarks.result import ROOT, Spread
from warm_dist import errors
from warm_dist.errors import ConfigError, UnmeasuredError, WarmDistError
from warm_dist.paths import path_argument, place_argument

if TYPE_CHECKING:
    import torch

    from warm_dist.checkpoints.weights import Model
    from warm_dist.config.run import Config
    from warm_dist.distributed.world import World
    from warm_dist.networks.compiled import Say

LEAST_S, MOST_S = 2 * SLACK_S, 1_000_000  # a budget: what leaves time to measure, and what a timer can hold
PEERS = ("diffusers", "denoising_diffusion_pytorch")
FIRST = (
    *("local-bf16-compiled", "zero1-bf16-compiled", "sampling-bf16-compiled", "diffusers-bf16"),
    *("denoising_diffusion_pytorch-bf16", "local-bf16", "zero3-bf16-compiled", "evaluation-bf16-compiled"),
    *("diffusers-bf16-compiled", "zero1-bf16", "zero3-bf16", "zero0-bf16-compiled", "zero2-bf16-compiled"),
    *("sampling-bf16", "evaluation-bf16", "local-fp32-compiled", "local-fp32", "sampling-fp32", "evaluation-fp32"),
)
ALL = [f"{engine}-{precision}{how}" for precision in PRECISIONS for engine in ENGINES for how in ("-compiled", "")]
CONTENDERS = (*FIRST, *(name for name in reversed(ALL) if name not in FIRST))
"""WHAT-PRECISION, with -compiled behind it or eager, in the order of their turns."""


def calls_of(what: str) -> tuple[int, int]:
    """Calls of a round, and before the first one: a batch of samples takes as long as many steps."""
    return (1, 1) if what in ("sampling", "evaluation") else (STEPS, WARM_UP)


def release() -> None:
    """Give back to the device what nobody holds any more: peers are in processes of their own."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def settings(name: str, config: str, batch_size: int, folder: str, changes: list[str]) -> Config:
    """The config that one contender runs. Raises ConfigError."""
    what, precision, compiled = parts_of(name)
    mine = unlogged(batch_size) | {"output": folder, "parallel.compile": compiled}
    return changed(config, mine | engine_keys(what if what in ENGINES else "local", precision), changes)


def sampling_model(config: Config, compiled: bool, device: torch.device, say: Say) -> Model:
    """A config's untrained network, which samples in the precision of its training."""
    from launch.benchmarks.pictures import made_up
    from warm_dist.checkpoints.weights import Model
    from warm_dist.networks.compiled import compile_blocks
    from warm_dist.networks.unet import build_network

    network = build_network(config).to(device)
    if compiled:
        compile_blocks(network, config.parallel.compile_cache, say)
    return Model(network, config, made_up(config))


def step_of(config: Config, world: World, say: Say) -> Callable[[], object]:
    """A training step on the same inputs again and again."""
    from launch.benchmarks.pictures import made_up, prepared
    from warm_dist.training.trainer import Trainer

    trainer, data = Trainer(config, world, made_up(config), say), prepared(config, world)
    return lambda: trainer.step(data)


def samples_of(model: Model, world: World, extracts: bool) -> Callable[[], object]:
    """Sampling of one full batch; extracts: as an evaluation does it, with lite0's features and their moments."""
    import numpy as np

    from warm_dist.evaluation.extractors import make_extractor
    from warm_dist.evaluation.feature_stream import FeatureStream
    from warm_dist.evaluation.generate import generate, sample_labels

    batch = model.config.train.batch_size
    labels = sample_labels(0, range(batch), model.info.num_classes)
    sample = partial(generate, model, range(batch), labels, seed=0, device=world.device, batch_size=batch)
    if not extracts:
        return sample
    every, none = np.ones(batch, np.bool_), np.zeros(batch, np.bool_)
    stream = FeatureStream(world, make_extractor("lite0", device=world.device), [every], none)
    return lambda: stream.add(range(batch), sample())


class Ours:
    """A contender of ours. Raises WarmDistError if its network could not be compiled."""

    def __init__(self, name: str, config: Config, world: World) -> None:
        from launch.benchmarks.peers.network import Subject
        from warm_dist.networks.flops import flops_per_image

        what, _, compiled = parts_of(name)
        said: list[str] = []

        def make() -> Callable[[], object]:
            if what in ENGINES:
                return step_of(config, world, said.append)
            return samples_of(sampling_model(config, compiled, world.device, said.append), world, what == "evaluation")

        self._subject = Subject(make, world.device, *calls_of(what))
        self.round = self._subject.round
        if warnings := [text for text in said if text.startswith("warning: ")]:
            raise WarmDistError(warnings[0].removeprefix("warning: "))
        self.facts = self._subject.facts()
        if what in ENGINES:
            self.facts["flops_per_image"] = flops_per_image(config)

    def close(self) -> None:
        """Let its tensors go."""
        del self._subject, self.round
        release()


def row(
    rounds: list[dict[str, Any]], facts: dict[str, Any], name: str, images: int, peak: float | None
) -> dict[str, Any]:
    """One contender's figures. peak: the device's peak in its precision, operations a second.

    seconds: of a call, a training step or a batch of samples. compile_s: what the first calls took longer than steady
    ones. mfu: of a training step. Memory is allocated tensors alone: no reserve of the allocator, no context of CUDA.
    """
    what, _, compiled = parts_of(name)
    seconds = Spread.of([found["seconds"] for found in rounds])
    speed = Spread.of([images / found["seconds"] for found in rounds])
    flops = facts.get("flops_per_image")
    peaks = [found["peak"] for found in rounds if found["peak"] is not None]
    return {
        "images_per_s": asdict(speed),
        "seconds": asdict(seconds),
        "mfu": flops * speed.median / peak if flops and peak else None,
        "peak_gib": max(peaks) / 2**30 if peaks else None,
        "state_gib": None if facts["state"] is None else facts["state"] / 2**30,
        "wait_share": facts["wait_share"],
        "compile_s": facts["first_s"] - calls_of(what)[1] * seconds.median if compiled else None,
        "cached": facts["cached"] if compiled else None,
        "rounds": len(rounds),
        **{key: facts[key] for key in ("flops_per_image", "parameters", "versions") if key in facts},
    }


def report(rounds: Rounds, config: Config, device: torch.device) -> dict[str, Any]:
    """What --json prints; contenders that were measured have a row. config: anybody's."""
    import torch

    from warm_dist.config.batch import micro_batches
    from warm_dist.networks.flops import known_peak

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    images, given = config.train.batch_size, config.parallel.peak_flops
    return {
        "device": name,
        "torch": torch.__version__,
        "images": images,
        "micro_batches": micro_batches(config, 1)[1],
        "sampler": [config.sampler.method, config.sampler.num_steps],
        "rows": {
            who: row(found, rounds.facts[who], who, images, given or known_peak(name, parts_of(who)[1]))
            for who, found in rounds.rounds.items()
        },
        "failed": rounds.failed,
        "cut_off": rounds.cut_off,
        "unreached": rounds.unreached,
    }


def table(found: dict[str, Any]) -> str:
    """The report as text."""

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    method, steps = found["sampler"]
    lines = [
        f"{found['device']}, torch {found['torch']}; {found['images']} images a training step and batch of samples; {method}, {steps} steps",
        "",
        f"{'':36}{'images/s':>12}{'min..max':>18}{'MFU':>8}{'peak GiB':>10}{'host wait':>11}{'compile s':>11}  rounds",
    ]
    for name, line in found["rows"].items():
        text = f"{name:36}{Spread(**line['images_per_s']).columns(1)}{cell(line['mfu'], 3):>8}{cell(line['peak_gib'], 2):>10}"
        text += f"{cell(line['wait_share'], 3):>11}{cell(line['compile_s'], 1):>11}{line['rounds']:8}"
        lines.append(text + ("  compiled before" if line["cached"] else ""))
    lines += [f"{name:36}  failed: {reason}" for name, reason in found["failed"].items()]
    lines += [f"{name:36}  cut off in its first round" for name in found["cut_off"]]
    end = f"interrupted after {found['took_s']:.0f} s" if found["interrupted"] else None
    within = "" if end else f" in {found['budget_s']:g} s"
    lines += [f"{name:36}  not reached{within}" for name in found["unreached"]]
    return "\n".join([*lines, *(text for text in (found["skipped"], end) if text)])


def measure(rounds: Rounds, names: list[str], number: int) -> bool:
    """Take turns and show how far it is on stderr, line by line where that is no terminal; False after Ctrl-C."""
    from tqdm import tqdm

    told: set[str] = set()
    try:
        with closing(rounds.measure(names)) as turns:
            for name in tqdm(turns, desc="gpu", total=number * len(names), disable=None):
                if name not in told and not sys.stderr.isatty():
                    told.add(name)
                    print(f"{len(told)}/{len(names)} {name}: {rounds.outcome(name)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        return False
    return True


def gpu(args: argparse.Namespace) -> int:
    """The subcommand `gpu`."""
    begun = time.monotonic()
    if min(args.rounds, args.images) < 1 or not LEAST_S <= args.budget <= MOST_S:
        raise ConfigError(f"--rounds and --images must be at least 1, --budget from {LEAST_S:g} to {MOST_S} s")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from warm_dist.distributed.world import join, shutdown

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; --device cpu measures on the processor")
    names, skipped = list(dict.fromkeys(args.contenders)), None
    if not args.peers_python.exists() and any(parts_of(name)[0] in PEERS for name in names):
        skipped = f"peers are skipped: {args.peers_python} does not exist; `make peers` makes it"
        print(skipped, file=sys.stderr, flush=True)
        names = [name for name in names if parts_of(name)[0] not in PEERS]
    with tempfile.TemporaryDirectory(prefix="warm-dist-bench-") as folder:
        configs = {name: settings(name, args.config, args.images, folder, args.set) for name in names}
        common = settings(CONTENDERS[0], args.config, args.images, folder, args.set)
        world = join(60)

        def start(name: str) -> Contender:
            what, _, compiled = parts_of(name)
            release()  # after one that failed, or was cut off
            if what not in PEERS:
                return Ours(name, configs[name], world)
            log = Path(folder) / f"{name}.log"
            return Peer(args.peers_python, what, compiled, configs[name], world.device, log)

        rounds = Rounds(start, args.rounds, args.budget - (time.monotonic() - begun))
        whole = measure(rounds, names, args.rounds)
        found = report(rounds, common, world.device)
        shutdown()
    found |= {"config": args.config, "set": args.set, "skipped": skipped}
    found |= {"budget_s": args.budget, "took_s": time.monotonic() - begun, "interrupted": not whole}
    print(json.dumps(found) if args.json else table(found))
    if not whole:
        raise KeyboardInterrupt
    if not found["rows"]:
        raise UnmeasuredError("nothing was measured; the report tells why, by contender")
    return errors.EXIT_OK


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `gpu`."""
    command.add_argument(
        "--config", type=place_argument, default=str(ROOT / "configs" / "cifar10.json"), help="a file of configs/"
    )
    command.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override a key")
    command.add_argument("--images", type=int, default=256, help="of a step and of a batch (default: %(default)s)")
    text = "in the order of their turns; default: all of them"
    command.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="NAME",
        help=f"{text}: {', '.join(CONTENDERS)}",
    )
    command.add_argument("--rounds", type=int, default=5, help="everything once a round (default: %(default)s)")
    command.add_argument("--budget", type=float, default=540, help="seconds for all of it (default: %(default)s)")
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    command.add_argument("--peers-python", type=path_argument, default=ROOT / ".venv.peers" / "bin" / "python")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=gpu)
