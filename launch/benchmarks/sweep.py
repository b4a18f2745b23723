"""What Ray costs a trial: `launch/bench.py sweep`. The same training by hand and as a trial, in processor time.

A trial's process tree is Ray's worker with our actor in it, the supervisor, and the training. The digits of the tests are
packed into a temporary folder; scikit-learn has them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.benchmarks.result import ROOT, verdict
from warm_dist import errors
from warm_dist.errors import ConfigError

TARGET = 1.05  # of the processor time by hand, start-up apart
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the subcommand `sweep`."""
    parser.add_argument("--nimg", type=int, default=64_000, help="images of each training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="each way once a round (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The subcommand `sweep`: both ways, interleaved."""
    if args.rounds < 1 or args.nimg < 3200 or args.nimg % 3200:
        raise ConfigError("--rounds must be at least 1, --nimg a multiple of 3200")
    with tempfile.TemporaryDirectory(prefix="warm-dist-bench-") as folder:
        pack = [sys.executable, "-m", "data_pipelines.pack", "digits", f"{folder}/digits", "--resolution", "8"]
        subprocess.run(pack, check=True, capture_output=True)
        hand, trial, start, worker = [], [], [], []
        for number in range(args.rounds):
            begun, own, total = _in_ray(Path(folder), args.nimg, number)
            start.append(begun)
            worker.append(own - begun)
            trial.append(total)
            hand.append(_by_hand(Path(folder), number))
    ratios = [(whole - begun) / alone for whole, begun, alone in zip(trial, start, hand, strict=True)]
    report = {
        "nimg": args.nimg,
        "by_hand_cpu_s": statistics.median(hand),
        "trial_cpu_s": statistics.median(trial),
        "start_up_cpu_s": statistics.median(start),
        "worker_cpu_s": statistics.median(worker),
        "ratio": verdict(ratios, TARGET, below=True),
    }
    print(json.dumps(report) if args.json else table(report))
    return errors.EXIT_OK


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    ratio = report["ratio"]
    met = "met" if ratio["met"] else "missed"
    return "\n".join(
        [
            f"one training of {report['nimg']:,} digits, processor seconds of its process tree, medians",
            f"  by hand                   {report['by_hand_cpu_s']:8.2f}",
            f"  as a trial inside Ray     {report['trial_cpu_s']:8.2f}",
            f"  of that start-up          {report['start_up_cpu_s']:8.2f}   (Ray's worker, until training begins)",
            f"  and of Ray's worker later {report['worker_cpu_s']:8.2f}   (it waits, reads metrics.jsonl and reports)",
            f"  ratio without start-up    {ratio['median']:8.3f}   {ratio['min']:.3f}..{ratio['max']:.3f}   at most {TARGET}: {met}",
        ]
    )


def _in_ray(folder: Path, nimg: int, number: int) -> tuple[float, float, float]:
    """Run a sweep of one trial; processor seconds of Ray's worker until training begins, of it in all, and of its tree."""
    output = folder / f"sweep{number}"
    sets = [f"data.manifest={folder}/digits/manifest.parquet", f"output={output}", f"node_dir={folder}/node"]
    sets += [f"train.total_nimg={nimg}", "train.save_nimg=3200", "train.log_nimg=3200", f"eval.eval_nimg={nimg // 4}"]
    sets += ['space={"process.bnr": {"grid": [0.5]}}', f"seeds=[{SEED}]", "scheduler=null", "surface=null"]
    config = ROOT / "configs" / "sweep_smoke.json"
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), "--config", str(config)]
    command += [part for text in sets for part in ("--set", text)]
    with (folder / f"sweep{number}.log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    begun, own, total = None, 0.0, 0.0
    try:
        while driver.poll() is None:
            tree = _tree(driver.pid)
            if tree is not None:
                begun, own, total = (tree[0] if begun is None else begun), tree[0], max(total, tree[1])
            time.sleep(0.05)
    finally:
        driver.terminate()
        driver.wait()
    if driver.returncode:
        raise errors.PeerError((folder / f"sweep{number}.log").read_text()[-2000:], driver.returncode, resumable=False)
    assert begun is not None
    return begun, own, total


def _tree(driver: int) -> tuple[float, float] | None:
    """Processor seconds of Ray's worker with the one trial's actor, by itself and with its tree, once training has begun."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(driver).children(recursive=True):  # raylet is among them, workers are its own
            if process.cmdline()[:1] and "ResourceTrainable" in process.cmdline()[0]:
                tree, own = [process, *process.children(recursive=True)], process.cpu_times()
                if len(tree) > 1 or own.children_user:
                    return own.user + own.system, sum(map(_seconds, tree))
    return None


def _seconds(process: Any) -> float:
    """User and system time, with that of ended children that were waited for."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _by_hand(folder: Path, number: int) -> float:
    """The trial's own config in a folder of its own; processor seconds of the command and all that it started."""
    (source,) = (folder / f"sweep{number}" / "trials").glob("*/trial.json")
    tree = json.loads(source.read_text())
    tree["output"] = str(folder / f"hand{number}")
    config = folder / f"hand{number}.json"
    config.write_text(json.dumps(tree))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", "--config", str(config)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise errors.PeerError(done.stderr[-2000:], done.returncode, resumable=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
