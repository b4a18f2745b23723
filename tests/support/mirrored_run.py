"""Run folders as a training leaves them, for the tests of the MLflow mirror."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from warm_dist.files import write_json
from warm_dist.runs.metrics import MetricsLog

STEPS = list(range(32, 32 * 41, 32))


def make_run(path: Path, url: str | None, attempt: int = 1, **train: Any) -> Path:
    path.mkdir(exist_ok=True)
    tracking = {"mlflow_url": url, "experiment": path.parent.name, "run_name": "trial"}
    data = {"endpoint_url": "https://key:hunter2@s3.example/x?X-Amz-Signature=hunter2"}
    write_json(
        path / "config.json",
        {"$schema": "schema.json", "train": {"lr": 1e-3, **train}, "data": data, "tracking": tracking},
    )
    facts = {"commit": "c0ffee", "fingerprint": "f" * 64, "world_size": 2, "num_parameters": 7}
    write_json(path / "run.json", {"attempt": attempt, **facts})
    return path


def log(path: Path, steps: list[int], attempt: int = 1, scale: float = 1.0) -> None:
    metrics = MetricsLog(path / "metrics.jsonl", attempt)
    for nimg in steps:
        metrics.write(nimg, "train", loss=scale / nimg, loss_blurry=scale / nimg / 2, grad_norm=None)


def end(path: Path, code: int, attempt: int = 1) -> None:
    tree = {"code": code, "reason": f"code {code}", "nimg": 1, "resumable": code == 75, "attempt": attempt}
    write_json(path / "exit.json", tree)
