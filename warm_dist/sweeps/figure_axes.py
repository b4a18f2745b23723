"""The axes of a sweep's pictures: places and ticks of values that are numbers over decades, 0 among them, or words."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from warm_dist.sweeps import ranking
from warm_dist.sweeps.ranking import short

GAP = 0.045  # of an axis, between two labels at least
_LOG_FROM = 20.0  # max/min from which a searched key's values get a log axis
_MANY = 9  # so many values of a key do not get a tick each


def log_places(values: Sequence[float]) -> dict[float, float]:
    """log10 of each value; 0 is left of the smallest by a seventh of their range, at least a third of a decade."""
    logs = {float(value): math.log10(value) for value in sorted(set(values)) if value > 0}
    low, high = min(logs.values(), default=0.0), max(logs.values(), default=0.0)
    return logs if 0 not in values else {0.0: low - max(1 / 3, (high - low) / 7)} | logs


def ticks(places: dict[float, float], log: bool, gap: float) -> list[tuple[float, str]]:
    """(place, label) by rising place, at least `gap` apart: of each value, or of round ones where there are many."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    known = [value for value in places if value > 0 or not log]
    if len(known) > _MANY:
        low, high = min(known), max(known)
        locator = LogLocator(subs=(1, 2, 5) if high < 3000 * low else (1,)) if log else MaxNLocator(6)
        found = [float(value) for value in locator.tick_values(low, high) if low <= value <= high]
        zero = {0.0: places[0.0]} if log and 0 in places else {}
        places = zero | {value: math.log10(value) if log else value for value in found}
    return _uncrowded([(place, short(value)) for value, place in places.items()], gap)


def _uncrowded(labels: Sequence[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    kept: list[tuple[float, str]] = []
    for place, label in sorted(labels):
        if not kept or place - kept[-1][0] > 0.999 * gap:  # evenly spaced ones differ by rounding
            kept.append((place, label))
    return kept


def extent(places: dict[Any, float]) -> float:
    """From the first place to the last."""
    return max(places.values()) - min(places.values())


def wide(values: Sequence[float], ratio: float) -> bool:
    """Whether values want a log axis."""
    return min(values) > 0 and max(values) > ratio * min(values)


class Coordinate(NamedTuple):
    """A vertical axis: each trial's place on it, 0 (bottom) to 1, and its ticks (place, label)."""

    name: str
    places: list[float]
    ticks: list[tuple[float, str]]


def coordinate(name: str, values: Sequence[Any], log: bool = False) -> Coordinate:
    """Numbers on a linear axis, a logarithmic one with log=True or where they are wide; evenly spaced with others."""
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in values]
    if all(numbers):
        log = log or wide(values, _LOG_FROM)
        ids: list[Any] = [float(value) for value in values]
        places = log_places(ids) if log else {value: value for value in ids}
        labels = ticks(places, log, GAP * extent(places))
    else:  # numbers by size, then the rest by their text
        ids, names = [*map(ranking.frozen, values)], [*map(short, values)]
        kinds = set(zip(numbers, ids, names, strict=True))
        order = sorted(kinds, key=lambda kind: (not kind[0], kind[1][1] if kind[0] else 0, kind[2]))
        places = {one: float(k) for k, (_, one, _) in enumerate(order)}
        wrapped = ["\n".join(textwrap.wrap(text, 18, max_lines=2, placeholder="…")) for _, _, text in order]
        labels = _uncrowded(list(enumerate(wrapped)), GAP * extent(places))
    low, size = min(places.values()), extent(places)
    scaled = {place: (place - low) / size if size else 0.5 for place in (*places.values(), *(x for x, _ in labels))}
    return Coordinate(name, [scaled[places[one]] for one in ids], [(scaled[place], label) for place, label in labels])


def fanned(column: Coordinate) -> list[float]:
    """The places, those of trials that share one moved by up to 0.015 either way, so that no line hides another."""
    out = list(column.places)
    for place, n in Counter(column.places).items():
        for k, trial in enumerate(i for i, other in enumerate(column.places) if other == place):
            out[trial] += 0.015 - 0.03 * k / (n - 1) if n > 1 else 0
    return out
