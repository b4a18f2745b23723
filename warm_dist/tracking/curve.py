"""Plots a run's curves: both heads' losses and the Fréchet distance over nimg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warm_dist.figures import new_figure, save_figure

_HEADS = {
    "loss": ("both heads", "black"),
    "loss_blurry": ("blurry head", "tab:blue"),
    "loss_residual": ("residual head", "tab:orange"),
}


def loss_curve(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the heads' losses and, on a second axis, the Fréchet distance with its floor over nimg.

    lines: records of metrics.jsonl, as `read_metrics` returns them. Raises OutputError.
    """

    figure = new_figure(figsize=(9, 5), dpi=110, layout="constrained")
    left = figure.add_subplot()
    left.set(xlabel="nimg (images trained on)", ylabel="training loss, network units", yscale="log")
    left.grid(alpha=0.25, which="both")
    for key, (label, colour) in _HEADS.items():
        points = _series(lines, "train", key)
        if points:
            left.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.3)
    distances = _series(lines, "eval", "frechet")
    if distances:
        right = left.twinx()
        right.set_ylabel("Fréchet distance", color="tab:green")
        right.set_ylim(0, 1.1 * max(value for _, value in distances))
        right.plot(*zip(*distances, strict=True), "o-", color="tab:green", label="Fréchet distance")
        floors = _series(lines, "eval", "floor")
        if floors:
            right.axhline(floors[-1][1], color="tab:green", linestyle=":", label="floor (real against real)")
    handles = [handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0]]
    if handles:
        left.legend(handles=handles, loc="upper right")
    save_figure(figure, path)


def _series(lines: Sequence[dict[str, Any]], kind: str, key: str) -> list[tuple[int, float]]:
    return [(line["nimg"], line[key]) for line in lines if line["kind"] == kind and line.get(key) is not None]
