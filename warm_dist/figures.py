"""Pictures: the sample grid and the curves of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from warm_dist.errors import OutputError

_GAP_PX = 2
_GAP_COLOUR = 208  # light grey: visible beside images on white and on black
_GRID_PX = 512
_HEADS = {
    "loss": ("both heads", "black"),
    "loss_blurry": ("blurry head", "tab:blue"),
    "loss_residual": ("residual head", "tab:orange"),
}


def save_grid(images: NDArray[np.uint8], path: Path, columns: int, scale: int | None = None) -> None:
    """Write images as one PNG, row by row; the file is replaced as a whole.

    images: (N, C, H, W) uint8, C = 1 or 3. scale: whole factor of enlargement, nearest neighbour; None: as small as
    makes the picture 512 px wide. Raises ValueError for another shape or type, OutputError if it cannot be written.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images: {images.dtype} {images.shape}, needs uint8 (N, 1 or 3, H, W), N > 0")
    _, _, height, width = images.shape
    rows = -(-len(images) // columns)
    scale = scale or max(1, -(-_GRID_PX // (columns * width)))
    pitch_y, pitch_x = scale * height + _GAP_PX, scale * width + _GAP_PX
    canvas = np.full((rows * pitch_y + _GAP_PX, columns * pitch_x + _GAP_PX, 3), _GAP_COLOUR, np.uint8)
    for k, image in enumerate(images.transpose(0, 2, 3, 1)):
        y, x = _GAP_PX + k // columns * pitch_y, _GAP_PX + k % columns * pitch_x
        large = image.repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[y : y + scale * height, x : x + scale * width] = large
    _replace(path, lambda temporary: Image.fromarray(canvas).save(temporary, format="PNG"))


def loss_curve(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the losses of both heads and the Fréchet distance (second axis, with its floor) over nimg, as a PNG.

    lines: records of metrics.jsonl, as `read_metrics` gives them. Raises OutputError if it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no global state, no display
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
    handles, labels = [], []
    for axes in figure.axes:
        ours = axes.get_legend_handles_labels()
        handles += ours[0]
        labels += ours[1]
    if labels:
        left.legend(handles, labels, loc="upper right")
    _replace(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def _series(lines: Sequence[dict[str, Any]], kind: str, key: str) -> list[tuple[int, float]]:
    return [(line["nimg"], line[key]) for line in lines if line["kind"] == kind and line.get(key) is not None]


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):  # gone after success; without a folder there is nothing to remove
            temporary.unlink()
