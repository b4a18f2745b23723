"""A sweep's results as a text table, CSV and Parquet."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from warm_dist.files import replace_file
from warm_dist.runs.metrics import finite
from warm_dist.sweeps import ranking
from warm_dist.sweeps.ranking import Outcome, amount, cut, ranked, searched, several_seeds, short

_WIDTH, _REASON = 120, 28  # characters of a line of text, and the least of them for a failure's reason
_CELL = (6, 36)  # least and most characters of a searched value
_TRIAL = {"trial": "string", "state": "string", "reason": "string", "rank": "int64", "seed": "int64",
          "total_nimg": "int64", "bnr": "double", "log10_bnr": "double"}  # fmt: skip
_EVALUATION = {"nimg": "int64", "attempt": "int64", "time": "timestamp", "frechet": "double", "spread": "double",
               "blocks": "int64", "floor": "double", "floor_n": "int64", "kid": "double", "precision": "double",
               "recall": "double", "num_images": "int64", "nfe": "int64", "sampled_bnr": "string", "method": "string",
               "metric_name": "string", "spec": "string", "measure": "string", "seconds": "double",
               "grid": "string"}  # fmt: skip
_NAMES = {"sampled_bnr": "bnr", "metric_name": "name"}  # column → key in metrics.jsonl, where they differ


def text(outcomes: Sequence[Outcome]) -> str:
    """The ranking as a table of 120 characters; with several seeds also a table of means over seeds.

    Raises ConfigError as `ranked` does.
    """
    order = ranked(outcomes)
    states = [outcome.state for outcome in order]
    counts = [
        f"{states.count(state)} {state}"
        for state in (ranking.FINISHED, ranking.STOPPED, ranking.FAILED, ranking.UNFINISHED)
        if state in states
    ]
    names = dict.fromkeys(record["name"] for outcome in order for record in outcome.evaluations)
    lines = ["; ".join([", ".join(counts) or "no trials", *names]), *_trials(order)]
    if several_seeds(order):
        lines += ["", "over seeds (n), complete recipes first", *_recipes(order)]
    return "\n".join(lines)


def _trials(order: Sequence[Outcome]) -> list[str]:
    keys, seeds = searched(order), several_seeds(order)
    head = ["rank", *ranking.headings(keys), *["seed"] * seeds, "state", "nimg", "Fréchet", "spread", "floor"]
    rows, reasons = [], [""]
    for rank, outcome in enumerate(order, 1):
        last = outcome.evaluations[-1] if outcome.evaluations else {}
        spread, floor = finite(last.get("spread")), finite(last.get("floor"))
        distance = "not finite" if outcome.distance is None else amount(outcome.distance)
        row = [str(rank), *_values(outcome.values, keys), *[str(outcome.seed)] * seeds, outcome.state]
        row += [f"{outcome.nimg:,}", distance] if last else ["", ""]
        row += ["" if spread is None else f"± {amount(spread)}", "" if floor is None else amount(floor)]
        rows.append(row)
        reasons.append((outcome.reason.strip().splitlines() or [""])[0])
    lines = _table([head, *rows], range(1, 1 + len(keys)), _WIDTH - _REASON * any(reasons))
    return [cut(f"{line}  {reason}", _WIDTH).rstrip() for line, reason in zip(lines, reasons, strict=True)]


def _recipes(order: Sequence[Outcome]) -> list[str]:
    keys = searched(order)
    rows = [[*ranking.headings(keys), "n", "mean", "std", "low … high"]]
    for group in ranking.groups(order):
        n = len(group.outcomes)
        row = [*_values(group.values, keys), f"{n} of {n + group.missing}" if group.missing else str(n)]
        row += [amount(group.mean), "" if group.std is None else f"± {amount(group.std)}"]
        rows.append([*row, f"{amount(group.low)} … {amount(group.high)}" if n > 1 else ""])
    return _table(rows, range(len(keys)), _WIDTH)


def _values(values: dict[str, Any], keys: Sequence[str]) -> list[str]:
    return [short(values[key]) if key in values else "" for key in keys]


def _table(rows: Sequence[Sequence[str]], soft: Sequence[int], width: int) -> list[str]:
    """Lines of right-aligned columns; those in `soft` are cut, the widest first, until a line has `width` characters."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for k in soft:
        widths[k] = min(widths[k], _CELL[1])
    while sum(widths) + 2 * len(widths) - 2 > width and any(widths[k] > _CELL[0] for k in soft):
        widths[max(soft, key=widths.__getitem__)] -= 1
    return ["  ".join(cut(cell, n).rjust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a CSV with one row per trial, best first: its last evaluation. Raises ConfigError as `ranked`, OutputError."""
    keys = _all_keys(outcomes)
    rows = [_row(rank, one, keys, (one.evaluations or [{}])[-1]) for rank, one in enumerate(ranked(outcomes), 1)]

    def fill(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*_TRIAL, *keys, *_EVALUATION])
            writer.writerows(["" if value is None else _plain(value) for value in row.values()] for row in rows)

    replace_file(path, fill)


def write_parquet(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a Parquet file with one row per evaluation, by rank and nimg; trials without one have a row of nulls.

    Columns: the trial's, log10_bnr (null for BNR 0), one per searched key (double if all its values are numbers, bool if
    all are booleans, else string: text as it is, the rest as JSON), the evaluation's; time is in UTC.
    Raises ConfigError as `ranked` does, OutputError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = _all_keys(outcomes)
    order = enumerate(ranked(outcomes), 1)
    rows = [_row(rank, one, keys, record) for rank, one in order for record in one.evaluations or [{}]]
    kinds = _TRIAL | {key: _kind([row[key] for row in rows]) for key in keys} | _EVALUATION
    types = {"timestamp": pa.timestamp("ms", tz="UTC")}
    columns = {name: [_as(kind, row[name]) for row in rows] for name, kind in kinds.items()}
    arrays = {name: pa.array(column, types.get(kinds[name], kinds[name])) for name, column in columns.items()}
    replace_file(path, lambda temporary: pq.write_table(pa.table(arrays), temporary))


def _all_keys(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(key for outcome in outcomes for key in outcome.values))


def _row(rank: int, outcome: Outcome, keys: Sequence[str], record: ranking.Record) -> dict[str, Any]:
    """Column → value, for _TRIAL, keys and _EVALUATION."""
    row = {name: getattr(outcome, name) for name in ("state", "reason", "seed", "total_nimg", "bnr")}
    row |= {"trial": outcome.name, "rank": rank, "log10_bnr": math.log10(outcome.bnr) if outcome.bnr else None}
    row |= {key: outcome.values.get(key) for key in keys}
    row |= {name: record.get(_NAMES.get(name, name)) for name in _EVALUATION}
    if record:
        row["time"] = datetime.fromtimestamp(record["time"], timezone.utc)
    return {name: row[name] for name in (*_TRIAL, *keys, *_EVALUATION)}


def _kind(values: Sequence[Any]) -> str:
    """The column type for the values of a searched key."""
    kinds = {type(value) for value in values if value is not None}
    return "double" if kinds and kinds <= {int, float} else "bool" if kinds == {bool} else "string"


def _as(kind: str, value: Any) -> Any:
    if value is None or kind not in ("double", "string"):
        return value
    return float(value) if kind == "double" else _plain(value)  # pyarrow does not convert ints from 2^53 on


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
