"""Ranks the trials of a sweep, and its recipes by their mean over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from warm_dist.errors import ConfigError
from warm_dist.runs.metrics import finite

FINISHED, STOPPED, FAILED, UNFINISHED = "finished", "stopped", "failed", "unfinished"
SEED, BNR = "train.seed", "process.bnr"
_DIGITS = 6  # longer numbers are rounded for display
Record = dict[str, Any]
"""A line of metrics.jsonl of kind "eval"."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one trial.

    values: searched key → JSON value, in the sweep's order. seed: train.seed. bnr: the constant BNR of training, None
    for a path over σ, a random or a cold one. total_nimg: planned images. state: "finished", "stopped" (early, by the
    scheduler), "failed" or "unfinished" (interrupted or pending). reason: why it failed, else "". evaluations: by
    rising nimg.
    """

    name: str
    values: dict[str, Any]
    seed: int
    bnr: float | None
    total_nimg: int
    state: str
    reason: str
    evaluations: list[Record]

    @property
    def nimg(self) -> int:
        """Images trained on at the last evaluation, 0 without one."""
        return int(self.evaluations[-1]["nimg"]) if self.evaluations else 0

    @property
    def distance(self) -> float | None:
        """The last Fréchet distance, or None if it is missing or not finite."""
        return finite(self.evaluations[-1].get("frechet")) if self.evaluations else None

    @property
    def complete(self) -> bool:
        """Whether training finished and its last evaluation is at its end."""
        return self.state == FINISHED and bool(self.evaluations) and self.nimg >= self.total_nimg


@dataclass(frozen=True)
class Group:
    """Trials that differ only in their seed.

    values: without the seed. outcomes, seeds: the trials that finished with a finite distance. mean, std (of the sample,
    None for one), low, high: of their last Fréchet distances. missing: number of other trials.
    """

    values: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    seeds: tuple[int, ...]
    mean: float
    std: float | None
    low: float
    high: float
    missing: int


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, best first. Raises ConfigError if their distances are of different measures.

    Order: finished trials by their last Fréchet distance; trials at an earlier evaluation, the most advanced first, then
    by distance; trials without an evaluation; failed trials.
    """
    _check_measures(outcomes)
    return sorted(outcomes, key=_order)


def _order(outcome: Outcome) -> tuple[int, int, float, str]:
    tier = 3 if outcome.state == FAILED else 0 if outcome.complete else 1 if outcome.evaluations else 2
    distance = math.inf if outcome.distance is None else outcome.distance
    return tier, 0 if tier == 0 else -outcome.nimg, distance, outcome.name


def _check_measures(outcomes: Sequence[Outcome]) -> None:
    found: dict[str, str] = {}  # measure → the first trial with it
    for outcome in sorted(outcomes, key=lambda one: one.name):
        for record in outcome.evaluations:
            found.setdefault(record["measure"], outcome.name)
    if len(found) > 1:
        examples = ", ".join(f"{measure} of {name}" for measure, name in found.items())
        raise ConfigError(
            f"the trials' Fréchet distances use {len(found)} different measures and cannot be compared ({examples}); "
            "give all trials the same data and the same eval section"
        )


def groups(outcomes: Sequence[Outcome]) -> list[Group]:
    """The recipes with a final distance: those complete for every seed first, then by mean distance."""
    members: dict[Any, list[Outcome]] = {}
    for outcome in ranked(outcomes):
        members.setdefault(frozen(recipe(outcome)), []).append(outcome)
    found = [_group(part) for part in members.values() if _final(part)]
    return sorted(found, key=lambda group: (group.missing > 0, group.mean, group.outcomes[0].name))


def _final(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.complete and outcome.distance is not None]


def _group(outcomes: Sequence[Outcome]) -> Group:
    final = _final(outcomes)
    distances = [outcome.distance for outcome in final if outcome.distance is not None]
    seeds = tuple(outcome.seed for outcome in final)
    mean, std = statistics.fmean(distances), statistics.stdev(distances) if len(distances) > 1 else None
    missing = len(outcomes) - len(final)
    return Group(recipe(final[0]), tuple(final), seeds, mean, std, min(distances), max(distances), missing)


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The best trial of the best recipe, or None if no trial has finished with a finite distance.

    The best recipe has the lowest mean over its seeds. A recipe with unfinished seeds is considered only if none is
    complete: a scheduler stops the worse seeds, which biases the mean of the others.
    """
    found = groups(outcomes)
    return found[0].outcomes[0] if found else None


def recipe(outcome: Outcome) -> dict[str, Any]:
    """The searched values without the seed."""
    return {key: value for key, value in outcome.values.items() if key != SEED}


def searched(outcomes: Sequence[Outcome]) -> list[str]:
    """The searched keys without the seed, in the sweep's order."""
    return list(dict.fromkeys(key for outcome in outcomes for key in recipe(outcome)))


def several_seeds(outcomes: Sequence[Outcome]) -> bool:
    """Whether the trials have more than one seed."""
    return len({outcome.seed for outcome in outcomes}) > 1


def frozen(value: Any) -> Any:
    """A hashable form, equal for equal JSON: 1 equals 1.0 but not true."""
    if isinstance(value, dict):
        return tuple(sorted((key, frozen(inner)) for key, inner in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    return isinstance(value, bool), value


def short(value: Any) -> str:
    """A JSON value for display: `0.5`, `true`, `power(bnr 0.5, exponent 0.2)`."""
    if isinstance(value, dict):
        inner = ", ".join(f"{key} {short(item)}" for key, item in value.items() if key != "kind" and item is not None)
        return f"{value.get('kind', '')}({inner})" if inner else str(value.get("kind", "{}"))
    if isinstance(value, list | tuple):
        return f"[{' '.join(map(short, value))}]"
    if isinstance(value, float):
        text = f"{value:.6g}"
        return text if len(text) <= _DIGITS else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def amount(value: float) -> str:
    """A distance for display; diverged networks can have very large ones."""
    return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.3g}"


def cut(text: str, width: int) -> str:
    """The text cut to `width` characters, with an ellipsis if it was longer."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def headings(keys: Sequence[str]) -> list[str]:
    """Each key's last part, or the whole path if two keys share that part."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]
