"""Grids and tables of images as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from warm_dist.errors import printable
from warm_dist.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Relative luminance 0.15 to 0.30: at least 3:1 (WCAG 1.4.11) on white and on the report's dark ground.
COLOURS = ("#2f7ed8", "#d9691b", "#2f9460", "#a063d8", "#d6455a", "#12929e", "#a07a1e", "#cc559c")
_GAP_PX = 2
_GAP_COLOUR = 208  # light grey: visible beside images on white and on black
_GRID_PX = 512


def save_grid(images: NDArray[np.uint8], path: Path, columns: int, scale: int | None = None) -> None:
    """Write images as one PNG, row by row.

    images: (N, C, H, W) uint8, C = 1 or 3. scale: integer enlargement by nearest neighbour; None: the least that makes
    the picture 512 px wide. Raises ValueError for another shape or dtype, OutputError if it cannot be written.
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
    replace_file(path, lambda temporary: Image.fromarray(canvas).save(temporary, format="PNG"))


def save_table(
    rows: Sequence[tuple[str, NDArray[np.uint8]]], columns: Sequence[str], title: str, path: Path, groups: int = 1
) -> None:
    """Write a table of images as one PNG, with a name beside each row and a heading above each column.

    rows: (name, (K, C, H, W) uint8), K = len(columns), C = 1 or 3. groups: equal groups of rows, with a gap between.
    Raises OutputError if it cannot be written.
    """
    figure = new_figure(figsize=(1.15 * len(columns) + 0.9, 1.15 * len(rows) + 0.3 * groups + 0.8), dpi=100)
    figure.suptitle(title, fontsize=11)
    per_group = len(rows) // groups
    outer = figure.add_gridspec(groups, 1, hspace=0.12, left=0.9 / figure.get_figwidth(), right=0.99, bottom=0.01,
                                top=1 - 0.85 / figure.get_figheight())  # fmt: skip
    for k, (name, images) in enumerate(rows):
        inner = outer[k // per_group].subgridspec(per_group, len(columns), wspace=0.04, hspace=0.04)
        for column, (heading, image) in enumerate(zip(columns, images.transpose(0, 2, 3, 1), strict=True)):
            axes = figure.add_subplot(inner[k % per_group, column])
            axes.imshow(image.squeeze(), interpolation="nearest", cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            if k == 0:
                axes.set_title(heading, fontsize=8)
            if column == 0:
                axes.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    save_figure(figure, path)


def new_figure(**options: Any) -> Figure:
    """A matplotlib figure whose texts are never markup: a `$` in a name of people is a `$`. options: of Figure."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # read whenever a text is made, also by a tick that is drawn
    return Figure(**options)


def save_figure(figure: Figure | None, path: Path) -> bool:
    """Write a matplotlib figure as PNG, the same bytes for the same figure; False without one. Raises OutputError."""
    if figure is not None:
        _make_plain(figure)
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))
    return figure is not None


def _make_plain(figure: Figure) -> None:
    """Replace what no font can draw, and the markup in which matplotlib writes the numbers of logarithmic axes."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter, LogFormatterMathtext

    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()))
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        for kind in (axis.major, axis.minor):
            if isinstance(kind.formatter, LogFormatterMathtext):
                kind.formatter = LogFormatter()
                kind.formatter.set_axis(axis)
