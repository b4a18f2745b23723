"""Small sweeps on digits for the tests, started as people start them, and a look at their trials' processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.processes import MARK, ROOT, end_marked, marked
from warm_dist.files import read_json
from warm_dist.runs.metrics import read_metrics

TOTAL, EVERY = 1600, 400
SMALL = {
    "engine": "local",
    "data.resolution": 8,
    "data.channels": 1,
    "data.num_classes": 10,
    "data.num_lanes": 16,
    "network.channels": 16,
    "network.channel_mult": [1, 2],
    "network.attention_resolutions": [4],
    "train.batch_size": 16,
    "train.total_nimg": TOTAL,
    "train.lr_ramp_nimg": 0,
    "train.lr_decay_nimg": 0,
    "train.ema_half_life_nimg": 400,
    "train.horizontal_flips": False,
    "train.log_nimg": 80,
    "train.save_nimg": 400,
    "sampler.num_steps": 4,
    "eval.eval_nimg": EVERY,
    "eval.before_training": False,
    "eval.num_images": 64,
    "eval.extractor": "pixels",
    "eval.kid_images": 0,
    "eval.grid": 4,
    "eval.cache_dir": None,
}


def pack_digits(folder: Path) -> str:
    """The manifest's path."""
    from data_pipelines.pack import pack
    from data_pipelines.sources.open import open_source

    pack(open_source("digits", 8), str(folder / "digits"), None, shard_size=500)
    return str(folder / "digits" / "manifest.parquet")


def write_sweep(
    folder: Path, manifest: str, space: Mapping[str, Any], set: Mapping[str, Any] | None = None, **more: Any
) -> Path:
    """A sweep's file; its output is folder/sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.json").write_bytes((ROOT / "configs" / "quickstart.json").read_bytes())
    tree = {
        "base": "base.json",
        "set": {**SMALL, "data.manifest": manifest, **(set or {})},
        "output": str(folder / "sweep"),
        "node_dir": str(folder / "node"),
        "space": space,
        **more,
    }
    path = folder / "sweep.json"
    path.write_text(json.dumps(tree))
    return path


class Command:
    """`python launch/sweep.py …`, marked, so that all it starts is found wherever it goes."""

    def __init__(self, config: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.folder, self.mark = config.parent, f"{config}-{os.urandom(4).hex()}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "sweep.py"), "--config", str(config), *arguments],
            env={**inherited, **(env or {}), MARK: self.mark},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, timeout_s: float = 240) -> tuple[int, str]:
        """Its exit code and all that it said; nothing of it is left."""
        try:
            said, _ = self.process.communicate(timeout=timeout_s)
        finally:
            self.process.kill()
            end_marked(self.mark)
        return self.process.returncode, said

    def alive(self) -> list[int]:
        """The pids of all that it started and that lives, itself included; not what a Ray that it joined started."""
        return [found.pid for found in marked(self.mark)]

    def training(self, name: str = "") -> list[int]:
        """The pids of a trial's training processes, or of all trials', on whatever Ray."""
        here, trial = f"{self.folder}/", f"/{name}/trial.json" if name else "/trial.json"
        commands = {int(path.name): _words(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
        return [
            pid
            for pid, words in commands.items()
            if "launch.train" in words and "warm_dist.supervisor" not in words and here in words and trial in words
        ]

    def kill(self, name: str) -> bool:
        """kill -9 for a trial's training; True if there was any."""
        pids = self.training(name)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def evaluations(run: Path) -> list[tuple[int, int]]:
    """(nimg, attempt) of each."""
    return [(r["nimg"], r["attempt"]) for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "eval"]


def states(output: Path) -> dict[str, Any]:
    """How each trial ended, by the first part of its name (up to the digest)."""
    return {
        path.name.rpartition("-")[0]: read_json(path / "ended.json") for path in sorted((output / "trials").iterdir())
    }


def trial_named(output: Path, start: str) -> Path:
    """The folder of the one trial whose name begins so."""
    (found,) = (path for path in (output / "trials").iterdir() if path.name.startswith(start))
    return found
