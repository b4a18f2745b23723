"""Training: losses and gradient norms of 20 steps, and the files of every run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from tests.golden import data
from tests.golden.workshop import Command, Workshop, sha

STEPS, BATCH = 20, 8
BASE: dict[str, Any] = {
    "output": "unset",
    "data": {"manifest": "digits8/manifest.parquet", "resolution": 8, "channels": 1, "num_classes": 10, "num_lanes": 8}
    | {"chunk": 16, "window": 64},
    "process": {"bnr": 0.5},
    "network": {"arch": "ddpmpp", "channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "dropout": 0.1}
    | {"attention_resolutions": [4]},
    "train": {"total_nimg": BATCH * STEPS, "batch_size": BATCH, "micro_batch_size": 2, "lr": 1e-3, "lr_ramp_nimg": 32}
    | {"lr_decay_nimg": 40, "eps": 1e-4, "clip": 0.5, "horizontal_flips": True, "augment": 0.3, "label_dropout": 0.1}
    | {"ema_half_life_nimg": 100, "ema_lengths": [0.05, 0.1], "snapshot_nimg": BATCH * 10}
    | {"log_nimg": BATCH, "save_nimg": BATCH * 10},
    "parallel": {"timeout_s": 600},
}
"""Augmentation, accumulation (4 on one rank, 2 on two), clipping, dropout, hidden classes and three EMAs are all at work."""

COLOUR = {"manifest": "openmoji16/manifest.parquet", "resolution": 16, "channels": 3, "num_classes": 0}
PIXELS = {"eval_nimg": 80, "num_images": 32, "num_blocks": 2, "extractor": "pixels", "kid_images": 64, "grid": 4}
LONG = {"total_nimg": 8000, "batch_size": 32, "micro_batch_size": 32, "lr_ramp_nimg": 400, "lr_decay_nimg": 2000}
LONG |= {
    "lr": 3e-3,
    "augment": 0.0,
    "ema_half_life_nimg": 500,
    "log_nimg": 400 * 2,
    "save_nimg": 1600,
    "snapshot_nimg": 4000,
}
LITE0 = {"eval_nimg": 160, "before_training": False, "num_images": 24, "num_blocks": 1, "extractor": "lite0"}
LITE0 |= {"reference_images": 32, "kid_images": 24, "grid": 4}


class Run(NamedTuple):
    """A training: how many ranks, and its settings over BASE."""

    size: int
    settings: dict[str, Any]


def _engines() -> dict[str, Run]:
    engines = {"local": {"engine": "local"}} | {f"zero{stage}": {"parallel.zero_stage": stage} for stage in range(4)}
    return {
        f"{name}-{precision}-{size}": Run(size, engine | {"parallel.precision": precision})
        for name, engine in engines.items()
        for precision in ("fp32", "bf16")
        for size in (1, 2)
    }


def _local(**settings: Any) -> Run:
    return Run(1, {"engine": "local"} | {key.replace("__", "."): value for key, value in settings.items()})


ENGINES = _engines()
KINDS = {
    "cold": _local(process__bnr={"kind": "cold"}),
    "uniform": _local(
        process={"bnr": {"kind": "uniform", "low": 0.1, "high": 2}, "residual_weight": "balanced"},
        sampler__bnr=0.5,
    ),
    "log-uniform": _local(
        process={"bnr": {"kind": "log_uniform", "low": 0.1, "high": 2}, "residual_weight": "denoiser"},
        network__arch="adm",
        sampler__bnr={"kind": "power", "bnr": 0.5, "exponent": 0.2, "cap": 2.0},
    ),
    "power": _local(
        process={"bnr": {"kind": "power", "bnr": 0.5, "exponent": -0.2}, "residual_weight": "sampler"},
        process__sigma_data=0.5,
    ),
    "table": _local(
        process__bnr={"kind": "table", "sigma": [0.1, 1, 10], "bnr": [1, 0.5, 0.5]}, network__arch="ncsnpp"
    ),
    "per-frequency": _local(process__preconditioning="per_frequency", parallel__activation_checkpointing=True),
    "colour": _local(
        eval=LITE0,
        network__attention_resolutions=[8],
        sampler__num_steps=4,
        **{f"data__{k}": v for k, v in COLOUR.items()},
    ),
    "long": _local(eval=PIXELS | {"eval_nimg": 4000, "num_images": 64}, **{f"train__{k}": v for k, v in LONG.items()}),
    "pixels": Run(2, {"engine": "local", "eval": PIXELS, "sampler.num_steps": 4}),
    "offload": Run(2, {"parallel.zero_stage": 2, "parallel.offload_optimizer": True}),
}
"""Other processes, networks and pictures, the evaluations in training, and optimizers in the host's memory."""
RUNS = ENGINES | KINDS

EXACT_RECORDS = (
    "nimg",
    "loss",
    "loss_blurry",
    "loss_residual",
    "head_inconsistency",
    "grad_norm",
    "lr",
    "skipped_steps",
)
"""What a line of training in metrics.jsonl says beside times and memory."""


def train(shop: Workshop, names: Iterable[str]) -> None:
    """Train these RUNS in the folders runs/NAME, unless that is done."""
    missing = [name for name in names if not (shop.folder / "runs" / name).exists()]
    data.pack(shop, {"openmoji16" if name == "colour" else "digits8" for name in missing})
    shop.write_json("base.json", BASE)
    shop.out(*(_command(name, RUNS[name]) for name in missing))


def _command(name: str, run: Run) -> Command:
    sets = [f"--set={key}={json.dumps(value)}" for key, value in run.settings.items()]
    return Command(["launch/train.py", "--config", "base.json", f"--set=output=runs/{name}", *sets], run.size)


def values(shop: Workshop) -> dict[str, Any]:
    """Every run's losses, gradient norms and files."""
    train(shop, RUNS)
    out: dict[str, Any] = {name: _describe(shop, name) for name in RUNS}
    out["keys of metrics.jsonl"] = _keys(shop)
    return out


def records(shop: Workshop, name: str, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics.jsonl."""
    lines = (shop.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _describe(shop: Workshop, name: str) -> dict[str, Any]:
    lines = [{key: line[key] for key in EXACT_RECORDS} for line in records(shop, name, "train")]
    out = {"loss": [line["loss"] for line in lines], "grad_norm": [line["grad_norm"] for line in lines]}
    out["lines"] = sha(json.dumps(lines))
    run = shop.folder / "runs" / name
    files = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    out["files"] = sha("\n".join(map(str, files)))
    last = f"checkpoints/{STEPS * BATCH:012d}"
    for path in files:
        if str(path).startswith((last, "weights/")) or path.name in ("config.json", "exit.json"):
            out[str(path)] = shop.sha(f"runs/{name}/{path}")
    former = [
        path for path in files if path.parts[0] in ("checkpoints", "snapshots", "samples") and last not in str(path)
    ]
    out["former checkpoints, snapshots, samples"] = sha("\n".join(shop.sha(f"runs/{name}/{path}") for path in former))
    return out


def _keys(shop: Workshop) -> dict[str, str]:
    """The keys of each kind of line but the machine's load, whose keys are the machine's."""
    out: dict[str, set[str]] = {}
    for name in RUNS:
        for line in (shop.folder / "runs" / name / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["kind"] != "system":
                out.setdefault(record["kind"], set()).update(record)
    return {kind: " ".join(sorted(keys - {"mfu"})) for kind, keys in out.items()}
