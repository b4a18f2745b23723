"""What a training step costs: `launch/bench.py step`. EMA, metrics and mirror beside the network; two ranks beside one.

Every figure is of real processes that train on made-up images: the trainer's own loop, its own stopwatch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.benchmarks.result import ROOT, Spread, verdict
from warm_dist import errors, supervisor
from warm_dist.cpus import usable_cpus
from warm_dist.errors import ConfigError, WarmDistError
from warm_dist.paths import place_argument

if TYPE_CHECKING:
    from warm_dist.config.run import Config


SIDE_TARGET = 0.02  # of the step's processor time, for EMAs, metrics and their mirror together
SPEEDUP_TARGET = 0.9  # of `ranks` times one rank's images a second
JOB_S = 900  # the longest that one measurement may take
ALONE = ("bare", "one", "mirror")  # one rank: only the network; with EMAs and metrics; and with MLflow's mirror


def settings(args: argparse.Namespace, size: int, folder: Path, mlflow_url: str | None) -> Config:
    """The config to measure: the file's network, precision and stage; `--images` a rank and step; three EMAs."""
    from warm_dist.config.run import load_config

    batch, every = args.images * size, args.images * size * args.log_steps
    changes: dict[str, Any] = {
        "output": str(folder),
        "data.num_lanes": batch,
        "train.batch_size": batch,
        "train.micro_batch_size": None,
        "train.total_nimg": every * args.lines,
        "train.lr_decay_nimg": 0,
        "train.log_nimg": every,
        "train.save_nimg": every * args.lines,
        "train.snapshot_nimg": None,
        "train.ema_lengths": [0.05, 0.1],
        "eval": None,
        "tracking.mlflow_url": mlflow_url,
    }
    return load_config(args.config, [*args.set, *(f"{key}={json.dumps(value)}" for key, value in changes.items())])


class StepBench:
    """Starts the ranks of each measurement as processes of their own, turn by turn, and collects what they took."""

    def __init__(self, args: argparse.Namespace, folder: Path, mlflow_url: str | None) -> None:
        self.args, self.folder, self.mlflow_url = args, folder, mlflow_url
        self.runs: dict[str, list[dict[str, float]]] = {}
        self.load = os.getloadavg()[0]  # before the first measurement

    @property
    def turns(self) -> dict[str, tuple[str, int]]:
        """Name → kind and number of ranks; one round."""
        alone = {kind: (kind, 1) for kind in ALONE if kind != "mirror" or self.mlflow_url}
        return alone | {f"{size} ranks": ("one", size) for size in self.args.ranks}

    def measure(self) -> Iterator[None]:
        """Everything once a round; yields after each measurement."""
        for number in range(self.args.rounds):
            for name, (kind, size) in self.turns.items():
                self.runs.setdefault(name, []).append(self._run(kind, size, self.folder / f"{name}-{number}"))
                yield

    def _run(self, kind: str, size: int, folder: Path) -> dict[str, float]:
        from warm_dist.config.load import dump
        from warm_dist.supervisor import free_port

        folder.mkdir(parents=True)
        config = settings(self.args, size, folder, self.mlflow_url if kind == "mirror" else None)
        (folder / "settings.json").write_text(json.dumps(dump(config)))
        job = {"config": str(folder / "settings.json"), "kind": kind, "out": str(folder / "out.json")}
        common = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [
            supervisor.start(
                [sys.executable, str(ROOT / "launch" / "benchmarks" / "step_rank.py"), json.dumps(job)],
                {**os.environ, **common, "RANK": str(number), "LOCAL_RANK": str(number)},
                folder / f"rank_{number}.log",
            )
            for number in range(size)
        ]
        deadline = time.monotonic() + JOB_S
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                supervisor.stop(process)
        if not Path(job["out"]).exists():
            tail = "\n  ".join((folder / "rank_0.log").read_text(errors="replace").strip().splitlines()[-8:])
            raise WarmDistError(f"{kind} on {size} ranks measured nothing; its output ends:\n  {tail}")
        result: dict[str, float] = json.loads(Path(job["out"]).read_text())
        return result

    def report(self) -> dict[str, Any]:
        """What --json prints. Times: seconds a step. Shares: of the processor time that the main thread has without them."""
        one = self.runs["one"]
        network = [run["main_s"] - run["side_s"] for run in one]
        shares = {"EMAs and metrics": [run["side_s"] / rest for run, rest in zip(one, network, strict=True)]}
        total = shares["EMAs and metrics"]
        if mirrored := self.runs.get("mirror"):
            shares["MLflow's mirror"] = [run["mirror_s"] / (run["main_s"] - run["side_s"]) for run in mirrored]
            total = [sum(pair) for pair in zip(*shares.values(), strict=True)]
        rows = {
            name: {key: asdict(Spread.of([run[key] for run in runs])) for key in runs[0]}
            for name, runs in self.runs.items()
        }
        check = {
            name: asdict(Spread.of([a[key] / b[key] - 1 for a, b in zip(one, self.runs["bare"], strict=True)]))
            for name, key in (("processor time", "main_s"), ("time", "wall_s"))
        }
        return {
            "images": self.args.images,
            "rounds": self.args.rounds,
            "cores": usable_cpus(),
            "load": self.load,
            "log_steps": self.args.log_steps,
            "runs": rows,
            "shares": {name: asdict(Spread.of(values)) for name, values in shares.items()},
            "side": verdict(total, SIDE_TARGET, below=True),
            "with_against_without": check,
            "speedup": {name: self._speedup(size) for name, (_, size) in self.turns.items() if size > 1},
        }

    def _speedup(self, size: int) -> dict[str, Any]:
        """Images a second over `size` times one rank's, and what scaling.py expects of it.

        Expected: one rank's step, longer where ranks share a core, and the bytes of its stage at an all-reduce's speed.
        """
        from launch.benchmarks.scaling import sent_bytes
        from warm_dist.config.run import load_config

        pairs = list(zip(self.runs[f"{size} ranks"], self.runs["one"], strict=True))
        found = verdict(
            [many["images_per_s"] / (size * one["images_per_s"]) for many, one in pairs], SPEEDUP_TARGET, below=False
        )
        if size > usable_cpus():
            found |= {"target": None, "met": None}
        parallel = load_config(self.args.config, self.args.set).parallel
        expected, cpu = [], []
        for many, one in pairs:
            sent = sent_bytes(int(one["parameters"]), size, parallel.zero_stage, parallel.precision)
            step_s = one["wall_s"] * max(1.0, size / usable_cpus()) + sent / many["bandwidth"]
            expected.append(one["wall_s"] / step_s)
            cpu.append(one["process_s"] / many["process_s"])
        return found | {"expected": asdict(Spread.of(expected)), "processor": asdict(Spread.of(cpu))}


def _line(name: str, found: dict[str, Any], scale: float = 1.0, digits: int = 3) -> str:
    spread = Spread(*(scale * found[key] for key in ("median", "min", "max")))
    end = f"  target {scale * found['target']:g}: {'met' if found['met'] else 'missed'}" if found.get("target") else ""
    return f"{name:44}{spread.columns(digits)}{end}"


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    from warm_dist.training.step_metrics import PHASES

    one = report["runs"]["one"]
    lines = [
        f"{one['parameters']['median'] / 1e6:.2f} M parameters, {report['images']} images a rank and step, one thread a rank; "
        f"{report['rounds']} rounds of everything in turn, a line of metrics every {report['log_steps']} steps, {report['cores']} cores, "
        f"load average {report['load']:.1f} at the start",
        "",
        f"{'ms a step':44}{'median':>12}{'min..max':>18}",
    ]
    for name, run in report["runs"].items():
        lines.append(_line(name, run["wall_s"], 1e3, 1))
        if name not in ("bare", "mirror"):
            lines += [_line(f"  {place}", run[f"{place}_s"], 1e3, 1) for place in PHASES]
    lines += ["", "processor time in % of what the network takes"]
    lines += [_line(name, share, 100, 2) for name, share in report["shares"].items()]
    lines.append(_line("together", report["side"], 100, 2))
    for name, share in report["with_against_without"].items():
        lines.append(_line(f"change in {name} by EMAs and metrics", share, 100, 2))
    if "mirror" in report["runs"]:
        lines.append(_line("once, the mirror's start, s", report["runs"]["mirror"]["mirror_start_s"], 1, 1))
    lines += ["", "images/s over as many times one rank's"]
    for name, found in report["speedup"].items():
        lines += [_line(name, found), _line("  expected by launch/benchmarks/scaling.py", found["expected"])]
        lines.append(_line("  processor time of one rank over theirs", found["processor"]))
    return "\n".join(lines)


def step(args: argparse.Namespace) -> int:
    """The subcommand `step`."""
    if min(args.images, args.log_steps, args.rounds, *args.ranks) < 1 or args.lines < 2:
        raise ConfigError("--images, --log-steps, --rounds and --ranks must be at least 1, --lines at least 2")
    from tqdm import tqdm

    from launch.services import services

    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="warm-dist-bench-"))
        os.environ["TMPDIR"] = name  # weed writes logs of its own there
        for size in (1, *args.ranks):
            settings(args, size, Path(name), None)  # what is wrong with it is said before servers start
        url = None if args.no_mirror else stack.enter_context(services(Path(name) / "services")).mlflow_url
        bench = StepBench(args, Path(name), url)
        for _ in tqdm(bench.measure(), desc="step", total=args.rounds * len(bench.turns), disable=None):
            pass
        report = bench.report()
    print(json.dumps(report) if args.json else table(report))
    return errors.EXIT_OK


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `step`."""
    command.add_argument(
        "--config", type=place_argument, default=str(ROOT / "configs" / "quickstart.json"), help="a file of configs/"
    )
    command.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override a key")
    command.add_argument("--images", type=int, default=16, help="per rank and step (default: %(default)s)")
    command.add_argument("--log-steps", type=int, default=50, help="steps a line of metrics (default: %(default)s)")
    command.add_argument("--lines", type=int, default=3, help="lines a run; the first warms up (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=3, help="everything once a round (default: %(default)s)")
    command.add_argument("--ranks", type=int, nargs="*", default=[2], help="world sizes beside one (default: 2)")
    command.add_argument("--no-mirror", action="store_true", help="start no MLflow and no mirror")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=step)
