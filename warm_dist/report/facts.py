"""Reads the folders of runs and evaluations tolerantly: a missing or malformed fact is None, never a guess."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from warm_dist.config.bnr import AnyBNR, describe
from warm_dist.config.load import flatten
from warm_dist.errors import ConfigError, OutputError, redact
from warm_dist.records import read_record
from warm_dist.runs.folder import EXIT, METRICS, RUN, Attempt, End, read_config, read_results
from warm_dist.runs.metrics import finite, read_metrics

BEST, NEAR = "best", "within spread"


class Result(NamedTuple):
    """One Fréchet distance with its conditions. Only results with the same `measure` are comparable."""

    network: str
    nimg: int | None
    bnr: str
    method: str
    nfe: int | None
    frechet: float
    spread: float | None
    """Standard deviation over `blocks` blocks of seeds."""
    blocks: int | None
    floor: float | None
    floor_n: int | None
    kid: float | None
    precision: float | None
    recall: float | None
    name: str
    spec: str
    measure: str
    num_images: int | None


class Run(NamedTuple):
    """One run's folder, without secrets: user, password and query are removed from URLs."""

    name: str
    folder: Path
    config: dict[str, Any]
    info: dict[str, Any]
    exit: dict[str, Any] | None
    """None while the run is under way, or if it was killed."""
    lines: list[dict[str, Any]]

    def section(self, name: str) -> dict[str, Any]:
        """A section of the config, empty if missing."""
        return _tree(self.config.get(name))

    def series(self, key: str) -> list[tuple[float, float]]:
        """(nimg, value) of the "train" records where both are finite numbers."""
        pairs = [(finite(line["nimg"]), finite(line.get(key))) for line in self.lines if line["kind"] == "train"]
        return [(nimg, value) for nimg, value in pairs if nimg is not None and value is not None]

    def results(self) -> list[Result]:
        """The "eval" records with a finite distance, by rising nimg; the config fills in what old records lack."""
        sampler, settings = self.section("sampler"), self.section("eval")
        path = sampler.get("bnr")
        known = {
            "bnr": bnr_text(self.section("process").get("bnr") if path is None else path),
            "method": sampler.get("method"),
            "num_images": settings.get("num_images"),
        }
        lines = [{**known, **line} for line in self.lines if line["kind"] == "eval"]
        return [result for line in lines if (result := _result(line, self.name)) is not None]

    def speed(self) -> float | None:
        """Median images/s of all "train" records."""
        values = [value for _, value in self.series("images_per_s")]
        return statistics.median(values) if values else None

    def nimg(self) -> int | None:
        """Images trained on, from exit.json or else the last record."""
        last = [whole(line["nimg"]) for line in self.lines[-1:]]
        return whole((self.exit or {}).get("nimg")) or (last[0] if last else None)

    def status(self) -> tuple[str, str]:
        """The state ("finished", "stopped", "failed" or "under way") and its reason."""
        if self.exit is None:
            return "under way", "no exit.json: still running, or killed"
        code, reason = whole(self.exit.get("code")), as_text(self.exit.get("reason"))
        if code == 0:
            return "finished", ""
        return "stopped" if code == 75 else "failed", f"exit code {code}: {reason}"


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read each folder once, under a unique name. Raises ConfigError for a folder that is not a run's."""
    paths = list(dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders))
    return [_read(folder, name) for folder, name in zip(paths, unique_names(paths), strict=True)]


def _read(folder: Path, name: str) -> Run:
    config = redact(read_config(folder))
    if config is None:
        raise ConfigError(
            f"{folder}: not a run, its config.json is missing, unreadable or changed; give the output folder of a run"
        )
    info, end, path = read_record(folder / RUN, Attempt), read_record(folder / EXIT, End), folder / METRICS
    try:
        lines = [redact(line) for line in read_metrics(path)]
    except OutputError as error:
        raise ConfigError(str(error)) from None
    facts, ended = (redact(record.model_dump(exclude_none=True)) if record else None for record in (info, end))
    return Run(name, folder, config, facts or {}, ended, lines)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as make it unique. The paths must differ."""
    parts = [[os.fsencode(part).decode(errors="replace") for part in path.parts] for path in paths]
    depths = [1] * len(paths)
    while True:
        names = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        alike = [k for k, name in enumerate(names) if names.count(name) > 1 and depths[k] < len(parts[k])]
        if not alike:
            return names
        for k in alike:
            depths[k] += 1


def read_evaluation(folder: Path, runs: Sequence[Run]) -> list[Result]:
    """The results of a folder's results.json; networks of `runs` get their run's name.

    Raises ConfigError if the folder is not an evaluation's.
    """
    tree = read_results(folder)
    if tree is None:
        raise ConfigError(f"{folder}: not an evaluation, has no readable results.json; give launch/evaluate.py's --out")
    results = [_result(entry, _network(entry, runs)) for entry in redact(tree).values()]
    return [result for result in results if result is not None]


def _network(entry: dict[str, Any], runs: Sequence[Run]) -> str:
    text = as_text(entry.get("weights"))
    path = Path(os.path.realpath(text or "/"))
    inside = [run.name for run in runs if run.folder == path or run.folder in path.parents]
    # evaluated from another working folder: match by the run folder's name if it is unique
    alike = [run.name for run in runs if run.folder.name in Path(text).parts]
    if inside or len(alike) == 1:
        return (inside or alike)[0]
    return text or as_text(entry.get("sha256"))[:12] or "unnamed network"


def _result(line: dict[str, Any], network: str) -> Result | None:
    frechet, blocks = finite(line.get("frechet")), line.get("blocks")
    if frechet is None:
        return None
    fields: dict[str, Any] = {key: whole(line.get(key)) for key in ("nimg", "nfe", "floor_n", "num_images")}
    fields |= {key: finite(line.get(key)) for key in ("spread", "floor", "kid", "precision", "recall")}
    fields |= {key: as_text(line.get(key)) for key in ("bnr", "method", "name", "spec", "measure")}
    fields["blocks"] = len(blocks) if isinstance(blocks, list) else whole(blocks)
    fields["name"] = fields["name"] or "Fréchet distance"
    fields["measure"] = fields["measure"] or fields["spec"]
    return Result(network=network, frechet=frechet, **fields)


def by_measure(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Groups of comparable results in order of appearance; a result without a measure is its own group."""
    groups: dict[str, list[Result]] = {}
    for k, result in enumerate(results):
        groups.setdefault(result.measure or f"unknown ({k + 1})", []).append(result)
    return groups


def ranks(results: Sequence[Result]) -> list[str]:
    """The rank of each result of one measure: BEST for the lowest distance, NEAR within a spread of it, else "".

    A single result has no rank.
    """
    if len(results) < 2:
        return [""] * len(results)
    best = min(results, key=lambda result: result.frechet)

    def rank(result: Result) -> str:
        gap = result.frechet - best.frechet
        return BEST if gap == 0 else NEAR if gap <= max(result.spread or 0.0, best.spread or 0.0) else ""

    return [rank(result) for result in results]


def differing(configs: Sequence[dict[str, Any]]) -> dict[str, list[str | None]]:
    """The keys in which configs differ: dotted path → each config's value as JSON, None where the key is missing."""
    flat = [flatten(config) for config in configs]
    keys = sorted({key for one in flat for key in one})
    rows = {key: [as_json(one[key]) if key in one else None for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def bnr_text(value: Any) -> str:
    """A config's BNR as text, by `bnr.describe`; as JSON if this version does not know it."""
    try:
        return describe(TypeAdapter[Any](AnyBNR).validate_json(json.dumps(value)))
    except ValidationError:
        return "" if value is None else as_json(value)


def bnr_range(text: str) -> tuple[float, float] | None:
    """The range of a BNR on an axis: (b, b) for a number, (low, high) for a random one, None for a path or cold."""
    kind = re.match(r"(log_)?uniform", text)
    numbers = [float(found) for found in re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)]
    if kind and len(numbers) == 2:
        return numbers[0], numbers[1]
    try:
        value = finite(float(text))
    except ValueError:
        return None
    return None if value is None or value < 0 else (value, value)


def whole(value: Any) -> int | None:
    """Like `finite`, as an int."""
    number = finite(value)
    return None if number is None else int(number)


def as_text(value: Any) -> str:
    """Text or a number as text, anything else as ""."""
    return str(value) if isinstance(value, str | int | float) else ""


def as_json(value: Any) -> str:
    """JSON on one line, without escaping non-ASCII letters."""
    return json.dumps(value, ensure_ascii=False)


def _tree(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
