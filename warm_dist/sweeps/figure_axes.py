"""Axes of a sweep's figures: positions and ticks of values over decades, 0 included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from warm_dist.sweeps.ranking import short

GAP = 0.045  # least distance of two labels, as a fraction of the axis
_MANY = 9  # with more values than this, round numbers get the ticks


def log_places(values: Sequence[float]) -> dict[float, float]:
    """Value → log10; 0 goes left of the smallest by a seventh of the range, at least a third of a decade."""
    logs = {float(value): math.log10(value) for value in sorted(set(values)) if value > 0}
    low, high = min(logs.values(), default=0.0), max(logs.values(), default=0.0)
    return logs if 0 not in values else {0.0: low - max(1 / 3, (high - low) / 7)} | logs


def ticks(places: dict[float, float], log: bool, gap: float) -> list[tuple[float, str]]:
    """(position, label) in order, at least `gap` apart: one for each value, or round numbers if there are many."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    known = [value for value in places if value > 0 or not log]
    if len(known) > _MANY:
        low, high = min(known), max(known)
        locator = LogLocator(subs=(1, 2, 5) if high < 3000 * low else (1,)) if log else MaxNLocator(6)
        found = [float(value) for value in locator.tick_values(low, high) if low <= value <= high]
        zero = {0.0: places[0.0]} if log and 0 in places else {}
        places = zero | {value: math.log10(value) if log else value for value in found}
    kept: list[tuple[float, str]] = []
    for place, label in sorted((place, short(value)) for value, place in places.items()):
        if not kept or place - kept[-1][0] > 0.999 * gap:  # evenly spaced positions differ by rounding
            kept.append((place, label))
    return kept


def extent(places: dict[Any, float]) -> float:
    """The distance from the first position to the last."""
    return max(places.values()) - min(places.values())


def wide(values: Sequence[float], ratio: float) -> bool:
    """Whether the values span more than `ratio` and so need a log axis."""
    return min(values) > 0 and max(values) > ratio * min(values)
