"""Two figures of a sweep: Fréchet distance against BNR, and against images trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warm_dist.figures import COLOURS, new_figure, save_figure
from warm_dist.runs.metrics import finite
from warm_dist.sweeps import ranking
from warm_dist.sweeps.figure_axes import GAP, extent, log_places, ticks, wide
from warm_dist.sweeps.ranking import BNR, FAILED, FINISHED, SEED, STOPPED, UNFINISHED, Group, Outcome, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PALE, _GREY = "#bbbbbb", "#666666"
_NAMED = 10  # trials in the legend
_DARK_PART = 0.93  # fraction of viridis in use: its end is hard to see on white
_LOG_FROM = 4.0  # max/min from which distances get a log axis
_BOX = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
_STATES = {  # text in the legend, marker at the end of a line
    FINISHED: ("finished", "o"),
    STOPPED: ("stopped early", "x"),
    FAILED: ("failed", "X"),
    UNFINISHED: ("unfinished", "s"),
}


def bnr_curve(outcomes: Sequence[Outcome], path: Path) -> bool:
    """Write a PNG of the final Fréchet distance against BNR: mean and std over seeds, one curve for each other setting.

    Returns False, writing nothing, with fewer than two BNRs. Raises OutputError, and ConfigError as `ranked` does.
    """
    return save_figure(bnr_figure(outcomes), path)


def curves(outcomes: Sequence[Outcome], path: Path) -> bool:
    """Write a PNG of every trial's Fréchet distance against nimg; the legend names the best trials.

    Returns False, writing nothing, without distances. Raises OutputError, and ConfigError as `ranked` does.
    """
    return save_figure(curves_figure(outcomes), path)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """An empty figure and its axes. width, height: inches."""

    figure = new_figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _distance_axis(axes: Any, outcomes: Sequence[Outcome], values: Sequence[float], log: bool) -> list[Any]:
    """Fit the vertical axis to the values. Returns the floor's line; a floor far below shows in the legend only."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    def place(value: float) -> float:
        return value if not log else math.log10(value) if value > 0 else -math.inf

    records = [record for outcome in outcomes for record in outcome.evaluations]
    low, high = place(min(values)), place(max(values))
    room = max(high - low, 0.02 if log else 0.02 * abs(high), 1e-9)
    lines = []
    floor = next((found for one in records if (found := finite(one.get("floor"))) is not None), None)
    if floor is not None:
        below = place(floor) < low - 0.5 * room
        low, high = min(low, low if below else place(floor)), max(high, place(floor))
        label = f"floor {floor:.3g} (real against real{', below' if below else ''})"
        lines.append(axes.axhline(floor, color="black", linestyle=":", linewidth=1.2, label=label, zorder=1))
    room = max(room, high - low)
    limits = (low - 0.1 * room, high + 0.1 * room)
    axes.set(yscale="log" if log else "linear", ylim=[10**y if log else y for y in limits], ylabel=records[-1]["name"])
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if room < 1.3 else (1.0, 2.0, 5.0) if room < 4 else (1.0,)
    few = not log or room < 0.4  # decades: a log locator would find too few ticks there
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]) if few else LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", alpha=0.25)
    return lines


def bnr_figure(outcomes: Sequence[Outcome]) -> Figure | None:
    """The figure of `bnr_curve`, or None if there is nothing to draw."""
    found = [group for group in ranking.groups(outcomes) if group.outcomes[0].bnr is not None]
    places = log_places([_bnr(group) for group in found])
    if len(places) < 2:
        return None
    settings: dict[Any, list[Group]] = {}  # best first, like `found`
    for group in found:
        others = {key: value for key, value in group.values.items() if key != BNR}
        settings.setdefault(ranking.frozen(others), []).append(group)
    lines = [line for line in settings.values() if len(line) > 1][: len(COLOURS)]
    rest = [line for line in settings.values() if line not in lines]
    figure, axes = _figure(9, 5.2)
    _bnr_axis(axes, places)
    keys = [key for key in ranking.searched(outcomes) if key != BNR]
    alone = "mean ± std over seeds" if ranking.several_seeds(outcomes) else "trials"
    pale, what = (_PALE, "other settings") if lines else (COLOURS[0], "settings")
    for line in rest:
        _bnr_line(axes, line, places, pale)
    for colour, line in zip(COLOURS, lines, strict=False):
        _bnr_line(axes, line, places, colour)
        axes.plot([], [], "o-", color=colour, label=_caption(line[0].values, keys) or alone)
    if rest:
        axes.plot([], [], "o", color=pale, label=f"{len(rest)} {what}")
    top, spread = found[0], "" if found[0].std is None else f" ± {ranking.amount(found[0].std)}"
    axes.plot(places[_bnr(top)], top.mean, "*", color="gold", markeredgecolor="black", markersize=14, zorder=5,
              label=f"best: BNR {short(_bnr(top))}, {ranking.amount(top.mean)}{spread}")  # fmt: skip
    if any(group.missing for group in found):
        axes.plot([], [], "o", color=_GREY, markerfacecolor="white", label="hollow: not every seed finished")
    values = [value for group in found for value in (group.low, group.high)]
    _distance_axis(axes, outcomes, values, wide(values, _LOG_FROM))
    axes.legend(fontsize=8, title=ranking.cut(", ".join(ranking.headings(keys)), 44), title_fontsize=8)
    return figure


def _bnr(group: Group) -> float:
    return group.outcomes[0].bnr or 0.0  # groups without a BNR were left out


def _bnr_line(axes: Any, line: Sequence[Group], places: dict[float, float], colour: str) -> None:
    """Draw one setting: its means as a line, dashed from BNR 0 (not on the log scale), each seed as a pale dot beside."""
    line = sorted(line, key=_bnr)
    x, y = [places[_bnr(group)] for group in line], [group.mean for group in line]
    first = int(_bnr(line[0]) == 0)
    axes.plot(x[: 1 + first], y[: 1 + first], "--", color=colour, linewidth=1.2)
    axes.plot(x[first:], y[first:], "-", color=colour, linewidth=1.8)
    for place, group in zip(x, line, strict=True):
        axes.errorbar(place, group.mean, group.std, fmt="o", markersize=5.5, capsize=3, elinewidth=1.2,
                      color=colour, markerfacecolor="white" if group.missing else colour, zorder=3)  # fmt: skip
        if len(group.outcomes) > 1:
            x_dot, dots = place + 0.01 * extent(places), [one.distance for one in group.outcomes]
            axes.plot([x_dot] * len(dots), dots, "o", color=colour, alpha=0.5, markersize=4, markeredgewidth=0)


def _bnr_axis(axes: Any, places: dict[float, float]) -> None:
    """Set a tick at each BNR, or at round numbers if there are many; mark the axis as broken right of 0."""
    x = sorted(places.values())
    room = x[-1] - x[0]
    axes.set_xlim(x[0] - 0.05 * room, x[-1] + 0.05 * room)
    axes.set_xticks(*zip(*ticks(places, log=True, gap=GAP * room), strict=True))
    axes.set_xticks(x, minor=True)
    axes.set_xlabel("BNR = α/σ in training (log)")
    if 0 in places:
        axes.text((x[0] + x[1]) / 2, 0, "//", ha="center", va="center", transform=axes.get_xaxis_transform(), bbox=_BOX)


def _caption(values: dict[str, Any], keys: Sequence[str]) -> str:
    return ranking.cut(", ".join(short(values[key]) for key in keys if key in values), 44)


def curves_figure(outcomes: Sequence[Outcome]) -> Figure | None:
    """The figure of `curves`, or None if there is nothing to draw."""
    from matplotlib import colormaps

    drawn = [(rank, one, points) for rank, one in enumerate(ranking.ranked(outcomes), 1) if (points := _points(one))]
    if not drawn:
        return None
    figure, axes = _figure(12, 5.6)
    keys = [*ranking.searched(outcomes), *[SEED] * ranking.several_seeds(outcomes)]
    named, lines = min(_NAMED, len(drawn)), []
    for k, (rank, one, points) in enumerate(drawn):
        colour = colormaps["viridis"](_DARK_PART * k / max(1, named - 1)) if k < named else _PALE
        lines += axes.plot(*zip(*points, strict=True), color=colour, zorder=4 - k / len(drawn),
                           linewidth=3.2 if k == 0 else 1.6 if k < named else 0.8)  # fmt: skip
        name = _caption(one.values | {SEED: one.seed}, keys)
        lines[-1].set_label(f"{rank}.  {ranking.amount(points[-1][1])}  {name}")
        end = "tab:red" if one.state == FAILED else colour if k < named else _GREY
        axes.plot(*points[-1], _STATES[one.state][1], color=end, markersize=5 + 3 * (k == 0), zorder=5 - k / len(drawn))
    if len(drawn) > named:
        lines[named].set_label(f"others ({len(drawn) - named})")
    floor = _distance_axis(axes, outcomes, [value for _, _, points in drawn for _, value in points], log=True)
    axes.set_xlabel("nimg (images trained on)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    handles = [*lines[: named + 1], *_state_handles(outcomes, [one for _, one, _ in drawn]), *floor]
    title = ranking.cut("rank.  distance  " + ", ".join(ranking.headings(keys)), 60)
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, title=title, title_fontsize=8)
    return figure


def _points(outcome: Outcome) -> list[tuple[int, float]]:
    """(nimg, distance) of each positive, finite distance."""
    found = [(record["nimg"], finite(record.get("frechet"))) for record in outcome.evaluations]
    return [(nimg, value) for nimg, value in found if value is not None and value > 0]


def _state_handles(outcomes: Sequence[Outcome], drawn: Sequence[Outcome]) -> list[Any]:
    """Legend entries for the markers at the ends of lines: how many trials ended in each state."""
    from matplotlib.lines import Line2D

    handles = []
    for state, (name, marker) in _STATES.items():
        if count := sum(one.state == state for one in drawn):
            colour = "tab:red" if state == FAILED else _GREY
            handles.append(Line2D([], [], color=colour, label=f"{name} ({count})", linestyle="", marker=marker))
    if len(outcomes) > len(drawn):
        handles.append(Line2D([], [], linestyle="", label=f"without a distance ({len(outcomes) - len(drawn)})"))
    return handles
