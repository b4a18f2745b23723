"""Folders as runs and evaluations leave them, for the tests of the page that compares runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support.paths import ROOT
from warm_dist.config.load import dump
from warm_dist.config.run import load_config
from warm_dist.figures import save_grid
from warm_dist.report.page import write_report

EVIL = '<img src=x onerror="document.title=1">'
STEPS = (0, 16_000, 32_000)


def write_lines(run: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    text = "".join(json.dumps({"time": 1.7e9, "attempt": 1, **line}) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + tail)


def evaluated(nimg: int, frechet: float | None, **more: Any) -> dict[str, Any]:
    known = {"floor": 14.26, "floor_n": 1230, "name": "Fréchet distance (lite0)", "spec": "5bec", "measure": "aaaa11112222",
             "num_images": 2048, "nfe": 35, "method": "ancestral", "bnr": "0.5", "spread": 0.25, "blocks": 5}  # fmt: skip
    return {"nimg": nimg, "kind": "eval", "frechet": frechet, **known, **more}


def make_run(run: Path, bnr: Any = 0.5, lines: list[dict[str, Any]] | None = None, **config: Any) -> Path:
    run.mkdir(parents=True)
    tree = dump(load_config(ROOT / "configs/quickstart.json", [f"{key}={value}" for key, value in config.items()]))
    tree["process"]["bnr"] = bnr
    (run / "config.json").write_text(json.dumps(tree))
    facts = {"attempt": 1, "commit": "8a79836ba561+", "fingerprint": "a476c5987355", "world_size": 2,
             "num_parameters": 48_558, "device": "cpu", "zero_stage": 1}  # fmt: skip
    (run / "run.json").write_text(json.dumps(facts))
    if lines is not None:
        write_lines(run, lines)
    return run


def grids(run: Path, nimgs: tuple[int, ...], seed: int) -> None:
    from sklearn.datasets import load_digits

    digits = (load_digits().images[64 * seed :][:64] * 15.9).astype(np.uint8)[:, None]
    for k, nimg in enumerate(nimgs):
        save_grid(digits >> (len(nimgs) - 1 - k), run / "samples" / f"{nimg:012d}.png", columns=8)


def trained(seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    nimgs = range(160, 32_001, 160)
    loss = 0.3 + 1.5 / (1 + np.arange(len(nimgs)) / 12) + 0.02 * rng.standard_normal(len(nimgs))
    return [
        {"nimg": nimg, "kind": "train", "loss": value, "loss_blurry": 0.3 * value, "loss_residual": 0.7 * value,
         "lr": 1e-3, "grad_norm": value, "images_per_s": 200.0 + seed if k % 7 else None}
        for k, (nimg, value) in enumerate(zip(nimgs, loss.tolist(), strict=True))
    ]  # fmt: skip


class Made(NamedTuple):
    """Three runs, the first two of one measure; the page; what the third is called."""

    runs: list[Path]
    evaluation: Path
    page: Path


def make(folder: Path) -> Made:
    """Runs "low" and "mid" of one measure and one with a hostile name of another; an evaluation of "mid"; their page."""
    runs = []
    for k, (name, bnr, ends, measure) in enumerate(
        [("low", 0.1, (400.0, 90.5, 31.25), "aaaa11112222"), ("mid", 0.5, (410.0, 80.25, 26.75), "aaaa11112222"),
         (EVIL, 2, (90.0, 20.0, 3.5), "bbbb33334444")]
    ):  # fmt: skip
        distances = [
            evaluated(nimg, value, bnr=f"{bnr:g}", measure=measure, kid=0.0125, precision=0.625, recall=0.375)
            for nimg, value in zip(STEPS, ends, strict=True)
        ]
        runs.append(make_run(folder / name, bnr, trained(k) + distances, **{"train.seed": k}))
        grids(runs[-1], STEPS if k < 2 else (0, 9_000, 30_000), k)
    (runs[0] / "exit.json").write_text(json.dumps({"code": 0, "reason": "finished", "nimg": 32_000}))
    (runs[1] / "exit.json").write_text(json.dumps({"code": 75, "reason": "Stopped: SIGTERM", "nimg": 32_000}))
    evaluation = folder / "evaluation"
    evaluation.mkdir()
    results = {
        f"{nfe}-{bnr}": {**evaluated(0, 20 + 100 / nfe + bnr), "weights": str(runs[1]), "bnr": f"{bnr:g}", "nfe": nfe}
        for nfe in (9, 35)
        for bnr in (0, 0.5, 2)
    }
    (evaluation / "results.json").write_text(json.dumps(results))
    page = folder / "report.html"
    write_report(runs, [evaluation], page)
    return Made(runs, evaluation, page)
