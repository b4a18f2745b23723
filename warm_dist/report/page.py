"""Builds one self-contained HTML page that compares runs: tables, charts and sample grids."""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from warm_dist.files import replace_file
from warm_dist.report import charts, facts
from warm_dist.report.charts import Look, Series
from warm_dist.report.facts import Result, Run
from warm_dist.runs.folder import SAMPLES

MOST_STEPS = 12  # grids per run: keeps a page of ten runs below some 30 MB
_MOST_CHARTS = 6  # over the BNR; with more, single results of evaluations appear in their table only
_MOST_PX = 1024  # wider grids are shrunk, also for the page's size
_CURVES = (
    ("loss_blurry", "Training loss, blurry head", "network units", "log"),
    ("loss_residual", "Training loss, residual head", "network units", "log"),
    ("lr", "Learning rate", "lr", "exact"),
    ("grad_norm", "Gradient norm", "norm, before clipping", "log"),
    ("images_per_s", "Speed", "images/s", "linear"),
)
_DASHES = ("-", "--", ":", "-.")


class Chart(NamedTuple):
    """One figure: `summary` is its alternative text, `note` is shown below it."""

    title: str
    svg: str
    summary: str
    measure: str = ""
    note: str = ""


class Picture(NamedTuple):
    """One sample grid as a data URI."""

    nimg: int
    uri: str
    width: int
    height: int


def write_report(runs: Sequence[Path], evaluations: Sequence[Path], out: Path) -> None:
    """Write the page on these folders to `out`. Raises ConfigError for a folder of another kind, OutputError."""
    text = render(shown_facts(runs, evaluations))
    # "replace": JSON may hold a lone surrogate, which cannot be encoded
    replace_file(out, lambda temporary: temporary.write_bytes(text.encode("utf-8", "replace")))


def shown_facts(folders: Sequence[Path], evaluations: Sequence[Path]) -> dict[str, Any]:
    """Everything the template shows. Raises ConfigError for a folder that is not a run's or an evaluation's."""
    runs = facts.read_runs(folders)
    measured = [result for folder in evaluations for result in facts.read_evaluation(folder, runs)]
    names = list(dict.fromkeys([*(run.name for run in runs), *(result.network for result in measured)]))
    looks = {name: charts.look(k) for k, name in enumerate(names)}
    pictures = {run.name: sample_grids(run.folder) for run in runs}
    return {
        "title": f"Comparison of {len(runs)} runs" if len(runs) > 1 else f"Run {runs[0].name}",
        "date": datetime.datetime.now().astimezone(),
        "runs": [_header(run) for run in runs],
        "looks": looks,
        "groups": result_groups(runs),
        "unmeasured": [{"name": run.name, "speed": run.speed()} for run in runs if not run.results()],
        "curves": _curves(runs, looks),
        "bnr_charts": _bnr_charts(runs, measured, looks),
        "evaluated": [name for name in names if any(result.network == name for result in measured)],
        "matrices": matrices(measured),
        "alone": [group[0] for group in facts.by_measure(measured).values() if len(group) == 1],
        "pictures": {name: found for name, found in pictures.items() if found},
        "steps": sorted({picture.nimg for found in pictures.values() for picture in found}),
        "differing": facts.differing([run.config for run in runs]),
        "configs": {run.name: json.dumps(run.config, indent=2, ensure_ascii=False) for run in runs},
    }


def render(page: dict[str, Any]) -> str:
    """Render the facts as HTML. Everything except our own SVG is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def digest(text: str) -> str:
        """A script's hash in the form of a Content-Security-Policy."""
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    environment.filters |= {"number": number, "distance": distance, "grouped": grouped, "digest": digest}
    return environment.get_template("page.html.j2").render(page)


def _header(run: Run) -> dict[str, Any]:
    """The header facts of one run: state, size, hardware."""
    engine = run.config.get("engine")
    stage = run.info.get("zero_stage", run.section("parallel").get("zero_stage"))
    state, reason = run.status()
    return {
        "name": run.name,
        "state": state,
        "reason": reason,
        "nimg": run.nimg(),
        "total": facts.whole(run.section("train").get("total_nimg")),
        "attempt": facts.whole(run.info.get("attempt")),
        "bnr": facts.bnr_text(run.section("process").get("bnr")),
        "parameters": facts.whole(run.info.get("num_parameters")),
        "commit": facts.as_text(run.info.get("commit")),
        "fingerprint": facts.as_text(run.info.get("fingerprint")),
        "world_size": facts.whole(run.info.get("world_size")),
        "device": facts.as_text(run.info.get("device")),
        "zero": "none, engine local" if engine == "local" else facts.as_text(stage),
        "speed": run.speed(),
    }


def result_groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs' last results grouped by measure, each with its rank; "best" is None where nothing is ranked."""
    finals = [results[-1] for run in runs if (results := run.results())]
    speeds = {run.name: run.speed() for run in runs}
    groups: list[dict[str, Any]] = []
    for measure, results in facts.by_measure(finals).items():
        ranked = zip(results, facts.ranks(results), strict=True)
        rows = [{"result": result, "rank": rank, "speed": speeds[result.network]} for result, rank in ranked]
        best = next((row["result"] for row in rows if row["rank"] == facts.BEST), None)
        groups.append({"measure": measure, "rows": rows, "best": best, "first": results[0]})
    return groups


def matrices(measured: Sequence[Result]) -> list[dict[str, Any]]:
    """A table of (method, NFE) × BNR for each network and measure with several results; each measure's best is marked."""
    tables: list[dict[str, Any]] = []
    for measure, results in facts.by_measure(measured).items():
        if len(results) < 2:
            continue
        marks = dict(zip(map(id, results), facts.ranks(results), strict=True))
        for network in dict.fromkeys(result.network for result in results):
            mine = [result for result in results if result.network == network]
            columns = sorted(
                {result.bnr for result in mine}, key=lambda text: ((facts.bnr_range(text) or (float("inf"),))[0], text)
            )
            samplers = sorted({(result.method, result.nfe or 0) for result in mine})
            cells: dict[tuple[str, int, str], list[tuple[Result, str]]] = {}
            for result in mine:  # results in one cell differ in a setting without a column, such as sampler.eta
                cells.setdefault((result.method, result.nfe or 0, result.bnr), []).append((result, marks[id(result)]))
            rows = [(how, [cells.get((*how, bnr), []) for bnr in columns]) for how in samplers]
            tables.append({"network": network, "measure": measure, "first": mine[0], "columns": columns, "rows": rows})
    return tables


def _curves(runs: Sequence[Run], looks: dict[str, Look]) -> list[Chart]:
    """Charts of the training curves, and of the distances for each measure; charts without points are left out."""
    out = []
    whole = [run for run in runs if run.series("loss") and not run.series("loss_residual")]
    total = [("loss", "Training loss, all heads", "network units", "log")] if whole else []
    for key, title, unit, axis in [*total, *_CURVES]:
        have = [(run, points) for run in runs if (points := run.series(key))]
        if have:
            series = [Series(looks[run.name], points) for run, points in have]
            ends = [f"{run.name} {number(points[-1][1])} at nimg {grouped(points[-1][0])}" for run, points in have]
            svg = charts.curves(key, series, unit, axis == "log", noisy=axis != "exact")
            out.append(Chart(title, svg, f"{title} over nimg. Last values: {'; '.join(ends)}."))
    losses = sum(chart.title.startswith("Training loss") for chart in out)
    results = [result for run in runs for result in run.results() if result.nimg is not None]
    for k, (measure, group) in enumerate(facts.by_measure(results).items()):
        series = [
            Series(looks[name], [(float(one.nimg or 0), one.frechet) for one in mine], [one.spread for one in mine])
            for name in looks
            if (mine := [result for result in group if result.network == name])
        ]
        svg = charts.distances(f"frechet{k}", series, group[0].name, _floors(group))
        out.insert(losses + k, _distance_chart(f"{group[0].name} over nimg", measure, group, svg))
    return out


def _distance_chart(title: str, measure: str, group: Sequence[Result], svg: str, note: str = "") -> Chart:
    lowest = min(group, key=lambda result: result.frechet)
    values = (
        f"{len(group)} values; lowest {distance(lowest.frechet)}, {lowest.network} at BNR {lowest.bnr or 'unknown'}"
    )
    floors = ", ".join(distance(floor) for floor in _floors(group)) or "unknown"
    return Chart(title, svg, f"{title}, measure {measure}: {values}. Floor {floors}.", measure, note)


def _floors(group: Sequence[Result]) -> list[float]:
    return sorted({round(result.floor, 6) for result in group if result.floor is not None})


def _bnr_charts(runs: Sequence[Run], measured: Sequence[Result], looks: dict[str, Look]) -> list[Chart]:
    """A chart over the BNR for each measure: a run's last result as a point, an evaluation's results as one line a sampler."""
    finals = [results[-1] for run in runs if (results := run.results())]
    groups = facts.by_measure([*finals, *measured])
    if len(groups) > _MOST_CHARTS:  # in old evaluations each result has its own measure
        groups = {measure: group for measure, group in groups.items() if len(group) > 1 or group[0] in finals}
    out = []
    for k, (measure, group) in enumerate(groups.items()):
        lines: dict[tuple[str, str, int | None, bool], list[tuple[tuple[float, float], Result]]] = {}
        paths: list[str] = []
        for result in group:
            place = facts.bnr_range(result.bnr)
            if place is None:
                paths.append(f"{result.network}, BNR {result.bnr or 'unknown'}: {distance(result.frechet)}")
            else:
                line = (result.network, result.method, result.nfe, any(result is final for final in finals))
                lines.setdefault(line, []).append((place, result))
        methods = sorted({method for _, method, _, own in lines if not own})
        series = []
        for (network, method, nfe, own), points in lines.items():
            dashes = "-" if own else _DASHES[methods.index(method) % len(_DASHES)]
            series.append(_line(looks[network], sorted(points), "" if own else sampler(method, nfe), own, dashes))
        owns = sorted({sampler(method, nfe) for _, method, nfe, own in lines if own})
        note = f"The large marks: {' and '.join(owns)}." if owns else ""
        note += f" Not one number, so not on the axis: {'; '.join(paths)}." if paths else ""
        if series:
            svg = charts.distances(f"bnr{k}", series, group[0].name, _floors(group), bnr=True)
            out.append(_distance_chart(f"{group[0].name} over BNR", measure, group, svg, note.strip()))
    return out


def _line(look: Look, points: list[tuple[tuple[float, float], Result]], label: str, own: bool, dashes: str) -> Series:
    middles = [((low + high) / 2, result.frechet) for (low, high), result in points]
    spreads = [result.spread for _, result in points]
    return Series(look, middles, spreads, label, dashes, own, [place for place, _ in points])


def sample_grids(folder: Path) -> list[Picture]:
    """At most 12 of the run's grids by rising nimg, evenly chosen, including the first and the last."""
    paths = sorted(path for path in (folder / SAMPLES).glob("*.png") if path.stem.isdecimal())
    count = min(MOST_STEPS, len(paths))
    chosen = [paths[round(k * (len(paths) - 1) / max(count - 1, 1))] for k in range(count)]
    return [picture for path in chosen if (picture := _picture(path)) is not None]


def _picture(path: Path) -> Picture | None:
    """The grid, shrunk if it is too wide, or None for a file that does not decode."""
    from PIL import Image

    try:
        data = path.read_bytes()
        image: Image.Image = Image.open(io.BytesIO(data), formats=["PNG"])
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for a broken PNG
        return None
    if image.width > _MOST_PX:
        image = image.convert("RGB").resize((_MOST_PX, max(1, image.height * _MOST_PX // image.width)))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = buffer.getvalue()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return Picture(int(path.stem), uri, *image.size)


def sampler(method: str, nfe: int | None) -> str:
    """A sampler's label: `heun, NFE 35`."""
    return f"{method or 'unknown sampler'}, NFE {nfe or 'unknown'}"


def number(value: float | None, form: str = ".4g") -> str:
    """The number in the format (default: four significant digits), or a dash if unknown."""
    return "—" if value is None else format(value, form)


def distance(value: float | None) -> str:
    """A Fréchet distance with two decimals; large ones as whole numbers."""
    return "—" if value is None else f"{value:.2f}" if abs(value) < 1000 else grouped(value)


def grouped(value: float | None) -> str:
    """A whole number with a thin space between thousands."""
    return "—" if value is None else f"{round(value):,}".replace(",", "\u202f")
