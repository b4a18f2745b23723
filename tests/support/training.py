"""launch/train.py on the digits: by a launcher, as people start it, or as forks of the zygote where no launcher is the subject."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.packed import Packed
from tests.support.paths import ROOT
from tests.support.processes import free_port
from tests.support.ranks import environments
from tests.support.zygote import Forked, zygote
from warm_dist.runs.metrics import read_metrics

STEPS, BATCH = 20, 8
ENDLESS = "train.total_nimg=8000000"
End = tuple[int, str, str]
"""An ended process: its exit code, stdout and stderr."""


def digits_config(folder: Path, digits: Packed) -> Path:
    """A file of 20 small steps, a checkpoint after every fourth."""
    data = {"manifest": digits.manifest_url, "endpoint_url": digits.endpoint_url, "resolution": 8, "channels": 1}
    network = {"arch": "ddpmpp", "channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [4]}
    batch = {"total_nimg": BATCH * STEPS, "batch_size": BATCH, "log_nimg": BATCH, "save_nimg": BATCH * 4}
    rate = {"lr": 1e-3, "lr_ramp_nimg": 32, "eps": 1e-4, "clip": 1.0}
    tree = {
        "output": "unset",
        "data": {**data, "num_classes": 10, "num_lanes": 8, "chunk": 16},
        "process": {"bnr": 0.5},
        "network": network,
        "train": {**batch, **rate, "label_dropout": 0.1, "ema_half_life_nimg": 100},
    }
    path = folder / "digits.json"
    path.write_text(json.dumps(tree))
    return path


def launcher(name: str, ranks: int = 2) -> list[str]:
    """The words before the script: of deepspeed, torchrun or python."""
    bin_folder = Path(sys.executable).parent
    if name == "deepspeed":
        return [str(bin_folder / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    if name == "torchrun":
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
        return [str(bin_folder / "torchrun"), f"--nproc-per-node={ranks}", "--rdzv-backend=c10d", endpoint]
    return [sys.executable]


def environment() -> dict[str, str]:
    """Ours, without ranks, with the launchers in PATH."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    bin_folder = str(Path(sys.executable).parent)
    return env | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{bin_folder}:{env['PATH']}"}


def script(config: Path, run: Path, *overrides: str) -> list[str]:
    """The script and its arguments."""
    sets = [f"--set={item}" for item in (f"output={run}", *overrides)]
    return [str(ROOT / "launch" / "train.py"), "--config", str(config), *sets]


def start(
    command: list[str], config: Path, run: Path, *overrides: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """By a launcher, in a process group of its own."""
    return subprocess.Popen(
        [*command, *script(config, run, *overrides)],
        env=environment() | dict(env or {}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def fork(config: Path, run: Path, *overrides: str, env: Mapping[str, str] | None = None) -> Forked:
    """As plain python would."""
    return zygote().start(*script(config, run, *overrides), env=environment() | dict(env or {}))


def fork_ranks(config: Path, run: Path, *overrides: str, size: int = 2) -> list[Forked]:
    """As a launcher would, without it."""
    return [zygote().start(*script(config, run, *overrides), env=environment() | env) for env in environments(size)]


def finish(process: subprocess.Popen[str] | Forked, timeout_s: float = 240) -> End:
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode is not None
    return process.returncode, out, err


def train(command: list[str], config: Path, run: Path, *overrides: str, env: Mapping[str, str] | None = None) -> End:
    """`start` and `finish`."""
    return finish(start(command, config, run, *overrides, env=env))


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]


def reached(run: Path) -> int:
    """The nimg of the last line of metrics."""
    records = read_metrics(run / "metrics.jsonl")
    return records[-1]["nimg"] if records else 0


def outcome(run: Path) -> dict[str, Any]:
    """exit.json, without its digest."""
    found = dict(json.loads((run / "exit.json").read_text()))
    del found["sha256"]
    return found
