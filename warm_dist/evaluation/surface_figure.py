"""Fréchet distance over NFE and BNR as a heat map and as curves (the paper's Figure 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm_dist.figures import new_figure, save_figure

_TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # in each decade
Line = dict[str, Any]
"""A cell of results.json: weights, bnr (text), method, nfe, measure, name, frechet, spread and floor among others."""


@dataclass(frozen=True)
class Panel:
    """Comparable cells for one row of the figure: one measure, one method. nfe, bnr: columns and rows, increasing."""

    title: str
    nfe: tuple[int, ...]
    bnr: tuple[str, ...]
    cells: dict[tuple[str, int], Line]


def panels(lines: Sequence[Line]) -> list[Panel]:
    """Group cells into panels. Networks share one unless two of them have the same (bnr, nfe)."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["measure"], line["method"]), []).append(line)
    out = []
    for (_, method), group in groups.items():
        networks = {line["weights"] for line in group}
        shared = len({(line["bnr"], line["nfe"]) for line in group}) == len(group)
        for part in [group] if shared else [[x for x in group if x["weights"] == name] for name in sorted(networks)]:
            names = f"{len(networks)} networks" if shared and len(networks) > 1 else part[0]["weights"]
            cells = {(line["bnr"], line["nfe"]): line for line in part}
            nfe, bnr = {line["nfe"] for line in part}, {line["bnr"] for line in part}
            title = f"{part[0]['name']}, {method}, {names}"
            out.append(Panel(title, tuple(sorted(nfe)), tuple(sorted(bnr, key=_rank)), cells))
    return out


def _rank(bnr: str) -> tuple[float, str]:
    """Sort key: numbers by value, then other paths by name."""
    try:
        return float(bnr), ""
    except ValueError:
        return math.inf, bnr


def draw(parts: Sequence[Panel], path: Path) -> None:
    """Write a PNG with one row per panel: heat map, distance against NFE, against BNR. Raises OutputError."""
    heights = [1.6 + max(2.2, 0.42 * len(panel.bnr)) for panel in parts]
    figure = new_figure(figsize=(16, sum(heights)), dpi=110, layout="constrained")
    rows = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, panel in zip(rows, parts, strict=True):
        row.suptitle(panel.title, fontsize=11)
        left, middle, right = row.subplots(1, 3, width_ratios=[1.2, 1, 1])
        _heat_map(left, panel)
        _curves(middle, panel, "nfe")
        _curves(right, panel, "bnr")
    save_figure(figure, path)


def _heat_map(axes: Any, panel: Panel) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    cells = [[panel.cells.get((bnr, nfe), {}).get("frechet") for nfe in panel.nfe] for bnr in panel.bnr]
    values = [[math.nan if value is None else float(value) for value in row] for row in cells]
    finite = [value for row in values for value in row if 0 < value < math.inf]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    image = axes.imshow(values, cmap="viridis_r", norm=LogNorm(low, max(high, low * 1.001)), aspect="auto")
    axes.set(xlabel="NFE", ylabel="BNR")
    axes.set_xticks(range(len(panel.nfe)), panel.nfe)
    axes.set_yticks(range(len(panel.bnr)), panel.bnr)
    best = min(finite, default=math.nan)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            line = panel.cells.get((panel.bnr[y], panel.nfe[x]))
            dark = value > math.sqrt(low * high)  # large values are dark in viridis_r
            axes.text(
                x, y, _label(line), ha="center", va="center", fontsize=8, color="white" if dark else "black",
                fontweight="bold" if value == best else "normal",
            )  # fmt: skip
    axes.figure.colorbar(image, ax=axes, ticks=LogLocator(subs=_TICKS), format="%g").minorticks_off()


def _label(line: Line | None) -> str:
    if line is None:
        return ""
    if line.get("frechet") is None:
        return "not finite"
    spread = line.get("spread")
    return f"{line['frechet']:.4g}" + (f"\n± {spread:.2g}" if spread is not None else "")


def _curves(axes: Any, panel: Panel, along: str) -> None:
    """Draw distance along "nfe" or "bnr", with one curve for each value of the other."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullLocator

    curves: Sequence[Any] = panel.bnr if along == "nfe" else panel.nfe
    points: Sequence[Any] = panel.nfe if along == "nfe" else panel.bnr
    for k, curve in enumerate(curves):
        cells = [panel.cells.get((curve, p) if along == "nfe" else (p, curve)) for p in points]
        known = [(p, c) for p, c in zip(points, cells, strict=True) if c and c.get("frechet") is not None]
        x = [float(p) if along == "nfe" else points.index(p) for p, _ in known]
        axes.errorbar(
            x, [c["frechet"] for _, c in known], [c.get("spread") or 0.0 for _, c in known], fmt="o-", markersize=4,
            linewidth=1.2, capsize=2, color=colormaps["viridis"](0.9 * k / max(1, len(curves) - 1)),
            label=f"{'BNR' if along == 'nfe' else 'NFE'} {curve}",
        )  # fmt: skip
    floors = [cell["floor"] for cell in panel.cells.values() if "floor" in cell]
    if floors:
        axes.axhline(floors[0], color="black", linestyle=":", linewidth=1, label="floor (real against real)")
    axes.set(ylabel="Fréchet distance", yscale="log", xlabel=along.upper())
    if along == "nfe":
        axes.set_xscale("log")
        axes.set_xticks(panel.nfe, [str(n) for n in panel.nfe], minor=False)
        axes.minorticks_off()
    else:  # evenly spaced: 0 has no place on a log axis, and some paths are not numbers
        axes.set_xticks(range(len(panel.bnr)), panel.bnr, rotation=20 if max(map(len, panel.bnr)) > 5 else 0)
    axes.yaxis.set_major_locator(LogLocator(subs=_TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
