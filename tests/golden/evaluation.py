"""Fréchet distances and what stands beside them, with their fingerprints: in training, and by launch/evaluate.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.golden.training import records, train
from tests.golden.workshop import Workshop

COMMANDS = {
    "pixels": "launch/evaluate.py runs/long --nfe 5,6 --bnr 0.5,1 --method heun ancestral --blocks 2",
    "lite0": "launch/evaluate.py runs/colour --nfe 4 --bnr 0.5,0 --blocks 1",
}
RUNS = ["long", "pixels", "colour"]
_VARYING = {"time", "seconds", "digest"}  # a digest is of the times too


def values(shop: Workshop) -> dict[str, Any]:
    """Every number, by (which command or run, sampler)."""
    train(shop, RUNS)
    out: dict[str, Any] = {
        f"training, {run}": {str(line["nimg"]): _numbers(line) for line in records(shop, run, "eval")} for run in RUNS
    }
    shop.out(*([*words.split(), "--out", f"evaluation-{name}"] for name, words in COMMANDS.items()))
    for name in COMMANDS:
        found = json.loads((shop.folder / f"evaluation-{name}" / "results.json").read_text())
        lines = {f"{line['method']} {line['nfe']}, bnr {line['bnr']}": line for line in found.values()}
        out[f"command, {name}"] = {key: _numbers(line) for key, line in lines.items()}
        out[f"command, {name}"]["table.csv"] = shop.sha(f"evaluation-{name}/table.csv")
        out[f"command, {name}"]["pictures"] = {
            _picture(path.relative_to(shop.folder / f"evaluation-{name}")): shop.sha(str(path))
            for path in sorted((shop.folder / f"evaluation-{name}").rglob("*.png"))
        }
    return out


def _picture(path: Path) -> str:
    """The name without the digest of the weights, which another machine rounds in another way."""
    return re.sub(r"/[0-9a-f]{16}-", "/", str(path))


def _numbers(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _numbers(value) for key, value in tree.items() if key not in _VARYING}
    return [_numbers(value) for value in tree] if isinstance(tree, list) else tree
