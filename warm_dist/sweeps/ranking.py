"""What came of a sweep's trials: their ranking, the mean over seeds, a table for people, CSV and Parquet for programs."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from warm_dist.errors import ConfigError
from warm_dist.files import replace_file

FINISHED, STOPPED, FAILED, UNFINISHED = "finished", "stopped", "failed", "unfinished"
SEED, BNR = "train.seed", "process.bnr"
_WIDTH, _REASON = 120, 28  # characters of a line for people, and of them at least for why a trial failed
_CELL = (6, 36)  # characters of a searched value: no fewer, no more
_DIGITS = 6  # a number of more characters is rounded for people
_TRIAL = {"trial": "string", "state": "string", "reason": "string", "rank": "int64", "seed": "int64",
          "total_nimg": "int64", "bnr": "double", "log10_bnr": "double"}  # fmt: skip
_EVALUATION = {"nimg": "int64", "attempt": "int64", "time": "timestamp", "frechet": "double", "spread": "double",
               "blocks": "int64", "floor": "double", "floor_n": "int64", "kid": "double", "precision": "double",
               "recall": "double", "num_images": "int64", "nfe": "int64", "sampled_bnr": "string", "method": "string",
               "metric_name": "string", "spec": "string", "measure": "string", "seconds": "double",
               "grid": "string"}  # fmt: skip
_NAMES = {"sampled_bnr": "bnr", "metric_name": "name"}  # of an evaluation in metrics.jsonl, where others are a trial's
Record = dict[str, Any]
"""A line of metrics.jsonl of kind "eval"."""


@dataclass(frozen=True)
class Outcome:
    """One trial of a sweep.

    name: unique. values: the searched keys by dotted path, in the sweep's order → JSON value. seed: train.seed.
    bnr: the constant BNR it was trained at, None when that is a path over σ, random or cold. total_nimg: images it was
    to be trained on. state: "finished", "stopped" (early, by the scheduler), "failed" or "unfinished" (interrupted,
    pending). reason: why it failed, else "". evaluations: by rising nimg.
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
        """Images it had been trained on at its last evaluation, 0 without one."""
        return int(self.evaluations[-1]["nimg"]) if self.evaluations else 0

    @property
    def distance(self) -> float | None:
        """The last Fréchet distance, None when there is none or it is not finite."""
        return finite(self.evaluations[-1].get("frechet")) if self.evaluations else None

    @property
    def complete(self) -> bool:
        """Whether its last evaluation is that of the whole training."""
        return self.state == FINISHED and bool(self.evaluations) and self.nimg >= self.total_nimg


@dataclass(frozen=True)
class Group:
    """The trials that differ by their seed alone.

    values: without the seed. outcomes: those that finished with a finite distance, `seeds` theirs. mean, std (sample's,
    None for one), low, high: of their last Fréchet distances. missing: how many further trials have no such number.
    """

    values: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    seeds: tuple[int, ...]
    mean: float
    std: float | None
    low: float
    high: float
    missing: int


def finite(value: float | None) -> float | None:
    """The number, or None for one that is missing, infinite or not a number."""
    return float(value) if value is not None and math.isfinite(value) else None


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Best first, whatever their order. Raises ConfigError when their distances are of several measures.

    First the finished ones by their last Fréchet distance, then those that stand at an earlier evaluation, the farthest
    first and then by distance, then those without one, then the failed ones.
    """
    _one_measure(outcomes)
    return sorted(outcomes, key=_order)


def _order(outcome: Outcome) -> tuple[int, int, float, str]:
    tier = 3 if outcome.state == FAILED else 0 if outcome.complete else 1 if outcome.evaluations else 2
    distance = math.inf if outcome.distance is None else outcome.distance
    return tier, 0 if tier == 0 else -outcome.nimg, distance, outcome.name


def _one_measure(outcomes: Sequence[Outcome]) -> None:
    found: dict[str, str] = {}  # measure → the first trial with it
    for outcome in sorted(outcomes, key=lambda one: one.name):
        for record in outcome.evaluations:
            found.setdefault(record["measure"], outcome.name)
    if len(found) > 1:
        examples = ", ".join(f"{measure} of {name}" for measure, name in found.items())
        raise ConfigError(
            f"the trials' Fréchet distances are of {len(found)} measures, which cannot be compared ({examples}); give "
            "all trials the same data and the same eval section"
        )


def groups(outcomes: Sequence[Outcome]) -> list[Group]:
    """The recipes with a final number, those of which every seed has one first, then by the mean distance."""
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
    return Group(
        values=recipe(final[0]),
        outcomes=tuple(final),
        seeds=tuple(outcome.seed for outcome in final),
        mean=statistics.fmean(distances),
        std=statistics.stdev(distances) if len(distances) > 1 else None,
        low=min(distances),
        high=max(distances),
        missing=len(outcomes) - len(final),
    )


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The best trial of the best recipe, None before any has finished with a finite distance.

    The best recipe has the lowest mean over its seeds, not the luckiest seed. One of which some seed has not finished
    competes only when no recipe is complete: a scheduler stops the worse seeds, so the mean of the others flatters.
    """
    found = groups(outcomes)
    return found[0].outcomes[0] if found else None


def recipe(outcome: Outcome) -> dict[str, Any]:
    """The searched values but the seed."""
    return {key: value for key, value in outcome.values.items() if key != SEED}


def searched(outcomes: Sequence[Outcome]) -> list[str]:
    """The searched keys but the seed, in the sweep's order."""
    return list(dict.fromkeys(key for outcome in outcomes for key in recipe(outcome)))


def several_seeds(outcomes: Sequence[Outcome]) -> bool:
    return len({outcome.seed for outcome in outcomes}) > 1


def frozen(value: Any) -> Any:
    """Hashable and equal for equal JSON: 1 is 1.0 but not true."""
    if isinstance(value, dict):
        return tuple(sorted((key, frozen(inner)) for key, inner in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    return isinstance(value, bool), value


def short(value: Any) -> str:
    """A JSON value for people: `0.5`, `true`, `power(bnr 0.5, exponent 0.2)`."""
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
    """A distance for people; that of a network that diverged can have many digits."""
    return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.3g}"


def cut(text: str, width: int) -> str:
    """At most `width` characters; what was cut shows."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def headings(keys: Sequence[str]) -> list[str]:
    """Each key's last part, or the whole path where two keys end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]


def text(outcomes: Sequence[Outcome]) -> str:
    """The ranking as a table, cut to 120 columns, and with several seeds a second one of the means over them.

    Raises ConfigError as `ranked` does.
    """
    order = ranked(outcomes)
    states = [outcome.state for outcome in order]
    counts = [f"{states.count(state)} {state}" for state in (FINISHED, STOPPED, FAILED, UNFINISHED) if state in states]
    names = dict.fromkeys(record["name"] for outcome in order for record in outcome.evaluations)
    lines = ["; ".join([", ".join(counts) or "no trials", *names]), *_trials(order)]
    if several_seeds(order):
        lines += ["", "over seeds (n), complete recipes first", *_recipes(order)]
    return "\n".join(lines)


def _trials(order: Sequence[Outcome]) -> list[str]:
    keys, seeds = searched(order), several_seeds(order)
    head = ["rank", *headings(keys), *["seed"] * seeds, "state", "nimg", "Fréchet", "spread", "floor"]
    rows, reasons = [], [""]
    for rank, outcome in enumerate(order, 1):
        last = outcome.evaluations[-1] if outcome.evaluations else {}
        spread, floor = finite(last.get("spread")), finite(last.get("floor"))
        rows.append(
            [
                str(rank),
                *_values(outcome.values, keys),
                *[str(outcome.seed)] * seeds,
                outcome.state,
                f"{outcome.nimg:,}" if last else "",
                ("not finite" if outcome.distance is None else amount(outcome.distance)) if last else "",
                "" if spread is None else f"± {amount(spread)}",
                "" if floor is None else amount(floor),
            ]
        )
        reasons.append((outcome.reason.strip().splitlines() or [""])[0])
    lines = _table([head, *rows], range(1, 1 + len(keys)), _WIDTH - _REASON * any(reasons))
    return [cut(f"{line}  {reason}", _WIDTH).rstrip() for line, reason in zip(lines, reasons, strict=True)]


def _recipes(order: Sequence[Outcome]) -> list[str]:
    keys = searched(order)
    rows = [[*headings(keys), "n", "mean", "std", "low … high"]]
    for group in groups(order):
        n = len(group.outcomes)
        rows.append(
            [
                *_values(group.values, keys),
                f"{n} of {n + group.missing}" if group.missing else str(n),
                amount(group.mean),
                "" if group.std is None else f"± {amount(group.std)}",
                f"{amount(group.low)} … {amount(group.high)}" if n > 1 else "",
            ]
        )
    return _table(rows, range(len(keys)), _WIDTH)


def _values(values: dict[str, Any], keys: Sequence[str]) -> list[str]:
    return [short(values[key]) if key in values else "" for key in keys]


def _table(rows: Sequence[Sequence[str]], soft: Sequence[int], width: int) -> list[str]:
    """Right-aligned columns; those of `soft` are cut, the widest first, until a line has `width` characters."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for k in soft:
        widths[k] = min(widths[k], _CELL[1])
    while sum(widths) + 2 * len(widths) - 2 > width and any(widths[k] > _CELL[0] for k in soft):
        widths[max(soft, key=widths.__getitem__)] -= 1
    return ["  ".join(cut(cell, n).rjust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """One row a trial, ranked, with its last evaluation. Raises ConfigError as `ranked` does, OutputError."""
    keys = _all_keys(outcomes)
    rows = [_row(rank, one, keys, (one.evaluations or [{}])[-1]) for rank, one in enumerate(ranked(outcomes), 1)]

    def fill(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*_TRIAL, *keys, *_EVALUATION])
            writer.writerows(["" if value is None else _plain(value) for value in row.values()] for row in rows)

    replace_file(path, fill)


def write_parquet(outcomes: Sequence[Outcome], path: Path) -> None:
    """One row an evaluation, ranked and by rising nimg; a trial without one has a row whose evaluation is null.

    Columns: the trial's, log10_bnr (null for BNR 0), one for each searched key (double if all its values are numbers,
    bool if all are that, else string: text as it is, the rest as JSON; null is null), the evaluation's; time is in UTC.
    Raises ConfigError as `ranked` does, OutputError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = _all_keys(outcomes)
    order = enumerate(ranked(outcomes), 1)
    rows = [_row(rank, one, keys, record) for rank, one in order for record in one.evaluations or [{}]]
    kinds = _TRIAL | {key: _kind([row[key] for row in rows]) for key in keys} | _EVALUATION
    types = {"timestamp": pa.timestamp("ms", tz="UTC")}
    arrays = {
        name: pa.array([_as(kind, row[name]) for row in rows], types.get(kind, kind)) for name, kind in kinds.items()
    }
    replace_file(path, lambda temporary: pq.write_table(pa.table(arrays), temporary))


def _all_keys(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(key for outcome in outcomes for key in outcome.values))


def _row(rank: int, outcome: Outcome, keys: Sequence[str], record: Record) -> dict[str, Any]:
    """By column: _TRIAL, keys, _EVALUATION."""
    row = {name: getattr(outcome, name) for name in ("state", "reason", "seed", "total_nimg", "bnr")}
    row |= {"trial": outcome.name, "rank": rank, "log10_bnr": math.log10(outcome.bnr) if outcome.bnr else None}
    row |= {key: outcome.values.get(key) for key in keys}
    row |= {name: record.get(_NAMES.get(name, name)) for name in _EVALUATION}
    if record:
        row["time"] = datetime.fromtimestamp(record["time"], timezone.utc)
    return {name: row[name] for name in (*_TRIAL, *keys, *_EVALUATION)}


def _kind(values: Sequence[Any]) -> str:
    """Which type holds all values of a searched key."""
    kinds = {type(value) for value in values if value is not None}
    return "double" if kinds and kinds <= {int, float} else "bool" if kinds == {bool} else "string"


def _as(kind: str, value: Any) -> Any:
    if value is None or kind not in ("double", "string"):
        return value
    return float(value) if kind == "double" else _plain(value)  # pyarrow makes no double of an int from 2^53 on


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
