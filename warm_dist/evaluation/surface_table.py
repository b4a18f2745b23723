"""The results of launch/evaluate.py as a text table, a CSV file, a figure, and MLflow metrics."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

from warm_dist.evaluation import surface_figure
from warm_dist.files import replace_file

Line = dict[str, Any]
COLUMNS = ("weights", "bnr", "method", "nfe", "frechet", "spread", "blocks", "floor", "floor_n", "num_images", "kid",
           "precision", "recall", "name", "measure", "spec", "sha256")  # fmt: skip
MEASURES = ("frechet", "spread", "kid", "precision", "recall", "floor")


def write(lines: list[Line], out: Path) -> None:
    """Write OUT/table.csv and, with two or more cells, OUT/surface.png. Raises OutputError."""

    def fill(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)

    replace_file(out / "table.csv", fill)
    if len(lines) > 1:
        surface_figure.draw(surface_figure.panels(lines), out / "surface.png")


def points(lines: list[Line]) -> dict[tuple[str, int], float]:
    """MLflow metrics by (key, step), such as frechet/heun/bnr_0.5, with NFE as the step."""
    return {
        (f"{measure}/{line['method']}/bnr_{_name(line['bnr'])}", line["nfe"]): float(line[measure])
        for line in lines
        for measure in MEASURES
        if line.get(measure) is not None
    }


def _name(text: str) -> str:
    """Replace what MLflow does not allow in a metric's key."""
    return "".join(c if c.isalnum() or c in "_-. " else "_" for c in text)


def text(lines: list[Line]) -> str:
    """A text table: one row per cell, then one for each set of networks that differ only in their seed."""
    rows = [
        f"{'weights':<34} {'BNR':>12} {'method':>12} {'NFE':>4} {'Fréchet':>9} {'spread':>7} {'floor':>7}"
        f" {'KID':>8} {'precision':>9} {'recall':>6}"
    ]
    for line in lines:
        number = "not finite" if line["frechet"] is None else f"{line['frechet']:.2f}"
        spread = "" if line.get("spread") is None else f"± {line['spread']:.2f}"
        rest = f"{line['floor']:>7.2f}" if "floor" in line else ""
        if "kid" in line:
            rest += f" {line['kid']:>8.4f} {line['precision']:>9.3f} {line['recall']:>6.3f}"
        rows.append(f"{line['weights'][-34:]:<34} {_how(line)} {number:>9} {spread:>7} {rest}".rstrip())
    return "\n".join([*rows, *_seeds(lines)])


def _seeds(lines: list[Line]) -> list[str]:
    groups: dict[tuple[str, str], dict[int, Line]] = {}
    for line in lines:
        if line["frechet"] is not None:
            groups.setdefault((line["recipe"], line["spec"]), {})[line["seed"]] = line
    rows = []
    for group in (list(seeds.values()) for seeds in groups.values() if len(seeds) > 1):
        values = [line["frechet"] for line in group]
        name = f"{len(group)} seeds as {group[0]['weights'][-22:]}"
        spread = f"± {statistics.stdev(values):.2f}   {min(values):.2f} … {max(values):.2f}"
        rows.append(f"{name:<34} {_how(group[0])} {statistics.mean(values):>9.2f} {spread}")
    return rows


def _how(line: Line) -> str:
    return f"{line['bnr']:>12} {line['method']:>12} {line['nfe']:>4}"
