"""Charts of a report as inline SVG: text stays text, ink follows the page, each run has one colour and marker."""

from __future__ import annotations

import colorsys
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from warm_dist.figures import COLOURS

_INK = "#010203"  # unused elsewhere; replaced by currentColor to follow the page's colour scheme
_MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))
_MOST_POINTS = 300  # per curve: half a point per pixel
_LOG_FROM = 8.0  # max/min above which distances get a log axis: a linear one would hide the small values
_SIZE = (6.0, 3.3)  # inches, of 72 SVG units each
_LABEL_GAP = 9.0  # between labels, points: the height of their font
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "warm-dist",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.formatter.use_mathtext": False,
    "text.parse_math": False,
    "lines.linewidth": 1.4,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


class Look(NamedTuple):
    """A run's appearance in every chart and table: `#rrggbb`, matplotlib's marker, and that marker as a character."""

    colour: str
    marker: str
    glyph: str


class Series(NamedTuple):
    """Points (x, y) by rising x, standard deviations of y if known, and a label for the end of the line."""

    look: Look
    points: Sequence[tuple[float, float]]
    spreads: Sequence[float | None] = ()
    label: str = ""
    dashes: str = "-"
    own: bool = True
    """The run's own result, drawn larger than those of evaluations."""
    reach: Sequence[tuple[float, float]] = ()
    """(low, high) x of each point that represents a range."""


def look(k: int) -> Look:
    """The k-th run's look; after the eighth a new hue, equally far in luminance from white and the dark background."""
    marker, glyph = _MARKS[k % len(_MARKS)]
    if k < len(COLOURS):
        return Look(COLOURS[k], marker, glyph)
    hue = 0.618034 * k % 1.0  # the golden ratio puts each new hue into the widest gap
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if luminance(_hex(hue, middle)) < 0.2 else (low, middle)
    return Look(_hex(hue, low), marker, glyph)


def _hex(hue: float, lightness: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, 0.6))


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, 0 to 1. Source: WCAG 2.2, definition of relative luminance."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 300 points, each the mean of neighbours; the last x is kept, so that a curve ends with its run."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return list(points)
    parts = [points[k : k + size] for k in range(0, len(points), size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    means[-1] = (points[-1][0], means[-1][1])
    return means


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean over a fortieth of the curve on both sides, over fewer points (symmetric) at its ends."""
    out = []
    for k, (x, _) in enumerate(points):
        reach = min(len(points) // 40, k)
        part = points[k - reach : k + reach + 1]
        out.append((x, sum(y for _, y in part) / len(part)))
    return out


def curves(key: str, series: Sequence[Series], ylabel: str, log: bool = False, noisy: bool = True) -> str:
    """A chart of dense curves over nimg.

    key: unique in the page, prefix of the SVG's ids. log: use a log axis and omit values up to 0. noisy: draw the values
    pale and their running mean as the line.
    """

    def draw(axes: Any) -> None:
        drawn = [(one.look, [(x, y) for x, y in thin(one.points) if y > 0 or not log]) for one in series]
        drawn = [(look, points) for look, points in drawn if points]
        for look, points in drawn if noisy else []:  # below all lines
            axes.plot(*zip(*points, strict=True), color=look.colour, linewidth=0.7, alpha=0.3)
        for look, points in drawn:
            line = smooth(points) if noisy else points
            axes.plot(*zip(*line, strict=True), color=look.colour)
            axes.plot(*line[-1], color=look.colour, marker=look.marker, markersize=5)
        _scale(axes, log)
        _count_axis(axes)
        axes.set_ylabel(ylabel)

    return _svg(key, draw)


def distances(key: str, series: Sequence[Series], ylabel: str, floors: Sequence[float], bnr: bool = False) -> str:
    """A chart of Fréchet distances with spreads and floors, over nimg or, with `bnr`, over the BNR, 0 included."""

    def draw(axes: Any) -> None:
        for one in series:
            x, y = zip(*one.points, strict=True)
            errors = [spread or 0.0 for spread in one.spreads] if any(one.spreads) else None
            size = 7.5 if one.own and bnr else 4
            axes.errorbar(x, y, errors, color=one.look.colour, marker=one.look.marker, markersize=size, capsize=3,
                          linestyle=one.dashes if len(x) > 1 else "", linewidth=1.2, elinewidth=1, zorder=3 if one.own else 2)  # fmt: skip
            for (low, high), level in zip(one.reach, y, strict=False):
                axes.plot([low, high], [level, level], color=one.look.colour, linewidth=3, alpha=0.4)
        values = [*(y for one in series for _, y in one.points), *floors]
        low, high = min(values), max(values)
        log = low > 0 and high > _LOG_FROM * low
        _scale(axes, log)
        reach = max([spread for one in series for spread in one.spreads if spread], default=0.0)
        if log:
            axes.set_ylim(0.8 * low, 1.15 * (high + reach))
        elif low >= 0:
            axes.set_ylim(0, 1.08 * (high + reach) or 1)
        _bnr_axis(axes, series) if bnr else _count_axis(axes)
        axes.set_ylabel(ylabel)
        for text, floor in {f"floor {floor:.3g}": floor for floor in floors}.items():
            axes.axhline(floor, color=_INK, linestyle=":", linewidth=1, alpha=0.8)
            axes.annotate(text, (0, floor), (2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                          fontsize=8, alpha=0.8)  # fmt: skip
        _labels(axes, series)

    return _svg(key, draw)


def _labels(axes: Any, series: Sequence[Series]) -> None:
    """Put each label right of its line's last point, moving up those that would overlap."""
    ends = [(*axes.transData.transform(one.points[-1]), one) for one in series if one.label]
    level = -math.inf
    for _, y, one in sorted(ends, key=lambda end: end[1]):
        level = max(y, level + _LABEL_GAP)  # at 72 dpi a pixel is a point
        axes.annotate(one.label, one.points[-1], (7, level - y - 3), textcoords="offset points", fontsize=8,
                      parse_math=False, annotation_clip=False)  # fmt: skip


def _scale(axes: Any, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if log and axes.has_data():
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def _count_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.set_xlabel("nimg, images trained on")


def _bnr_axis(axes: Any, series: Sequence[Series]) -> None:
    """Make the axis linear from 0 to the smallest positive BNR and logarithmic above, with ticks at values not too near."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    values = {x for one in series for x, _ in one.points} | {x for one in series for pair in one.reach for x in pair}
    positive = sorted(value for value in values if value > 0) or [1.0]
    low, high = positive[0], positive[-1]
    axes.set_xscale("symlog", linthresh=low, linscale=0.5)
    axes.set_xlim(-0.25 * low if 0 in values else 0.7 * low, 1.45 * high)
    ticks: list[float] = [0.0] if 0 in values else []
    for value in positive:  # a label needs about a sixth of a decade
        if not ticks or value > 1.4 * ticks[-1]:
            ticks.append(value)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_xlabel("BNR = α/σ, sampled")


def count(value: float) -> str:
    """A number with a unit: 1500 → 1.5k, 2e6 → 2M; small numbers unchanged."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}"  # enough digits for ticks of a narrow axis


def _svg(key: str, draw: Callable[[Any], None]) -> str:
    """Draw a figure as an <svg> element for HTML, without namespaces and metadata, with ids unique in the page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_RC):
        figure = Figure(figsize=_SIZE, dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib's SVG has a viewBox"
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)  # would apply to the whole page
    body = re.sub(r"font-family: [^;]*; ", "", body).replace(_INK, "currentColor")
    body = re.sub(r'\bid="', f'id="{key}-', body).replace("url(#", f"url(#{key}-")
    body = body.replace('xlink:href="#', f'href="#{key}-')
    return f'<svg {box[0]} aria-hidden="true" focusable="false">{body.strip()}'
