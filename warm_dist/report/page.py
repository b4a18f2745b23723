"""One page that compares runs: tables, charts and sample grids in one HTML file that asks nothing of the network."""

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

MOST_STEPS = 12  # grids a run: a page of ten runs stays below some 30 MB
_MOST_CHARTS = 6  # of the BNR; beyond these, evaluations' results without company stay in their table
_MOST_PX = 1024  # a wider grid is shrunk, for the same reason
_CURVES = (
    ("loss_blurry", "Training loss, blurry head", "network units", "log"),
    ("loss_residual", "Training loss, residual head", "network units", "log"),
    ("lr", "Learning rate", "lr", "exact"),
    ("grad_norm", "Gradient norm", "norm, before clipping", "log"),
    ("images_per_s", "Speed", "images/s", "linear"),
)
_DASHES = ("-", "--", ":", "-.")


class Chart(NamedTuple):
    """One figure: `summary` is its alternative text, `note` stands below it."""

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
    """Read the folders and replace `out` by the page. Raises ConfigError for a folder of another kind, OutputError."""
    text = render(shown_facts(runs, evaluations))
    # "replace": JSON may hold half a surrogate pair, which no encoding has
    replace_file(out, lambda temporary: temporary.write_bytes(text.encode("utf-8", "replace")))


def shown_facts(folders: Sequence[Path], evaluations: Sequence[Path]) -> dict[str, Any]:
    """All that the template shows. Raises ConfigError for a folder that is not a run's or an evaluation's."""
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
    """Facts → HTML. Everything but our own SVG is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "distance": distance, "grouped": grouped, "digest": _digest}
    return environment.get_template("page.html.j2").render(page)


def _header(run: Run) -> dict[str, Any]:
    """The facts of one run that are no measurements."""
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
    """The runs' last results by measure, each with its rank there, and the one that is best; None where nothing is ranked."""
    finals = [results[-1] for run in runs if (results := run.results())]
    speeds = {run.name: run.speed() for run in runs}
    groups: list[dict[str, Any]] = []
    for measure, results in facts.by_measure(finals).items():
        rows = [
            {"result": result, "rank": rank, "speed": speeds[result.network]}
            for result, rank in zip(results, facts.ranks(results), strict=True)
        ]
        best = next((row["result"] for row in rows if row["rank"] == facts.BEST), None)
        groups.append({"measure": measure, "rows": rows, "best": best, "first": results[0]})
    return groups


def matrices(measured: Sequence[Result]) -> list[dict[str, Any]]:
    """For each network and measure of several results, a table of (method, NFE) × BNR; a measure's best one is marked."""
    tables: list[dict[str, Any]] = []
    for measure, results in facts.by_measure(measured).items():
        if len(results) < 2:
            continue
        marks = dict(zip(map(id, results), facts.ranks(results), strict=True))
        for network in dict.fromkeys(result.network for result in results):
            mine = [result for result in results if result.network == network]
            columns = sorted({result.bnr for result in mine}, key=_bnr_order)
            samplers = sorted({(result.method, result.nfe or 0) for result in mine})
            cells: dict[tuple[str, int, str], list[tuple[Result, str]]] = {}
            for result in mine:  # several in one cell differ in a setting that has no column, as sampler.eta
                cells.setdefault((result.method, result.nfe or 0, result.bnr), []).append((result, marks[id(result)]))
            rows = [(how, [cells.get((*how, bnr), []) for bnr in columns]) for how in samplers]
            tables.append({"network": network, "measure": measure, "first": mine[0], "columns": columns, "rows": rows})
    return tables


def _bnr_order(text: str) -> tuple[float, str]:
    place = facts.bnr_range(text)
    return (float("inf") if place is None else place[0], text)


def _curves(runs: Sequence[Run], looks: dict[str, Look]) -> list[Chart]:
    """Training curves and, one chart a measure, the distances; a chart that no run has a point for is left out."""
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
    told = f"{len(group)} values; lowest {distance(lowest.frechet)}, {lowest.network} at BNR {lowest.bnr or 'not told'}"
    floors = ", ".join(distance(floor) for floor in _floors(group)) or "not told"
    return Chart(title, svg, f"{title}, measure {measure}: {told}. Floor {floors}.", measure, note)


def _floors(group: Sequence[Result]) -> list[float]:
    return sorted({round(result.floor, 6) for result in group if result.floor is not None})


def _bnr_charts(runs: Sequence[Run], measured: Sequence[Result], looks: dict[str, Look]) -> list[Chart]:
    """One chart a measure: a run's last result is a point, an evaluation's of one sampler are a line over the BNR."""
    finals = [results[-1] for run in runs if (results := run.results())]
    groups = facts.by_measure([*finals, *measured])
    if (
        len(groups) > _MOST_CHARTS
    ):  # spec hashes of old evaluations: each result its own measure, all of them in a table
        groups = {measure: group for measure, group in groups.items() if len(group) > 1 or group[0] in finals}
    out = []
    for k, (measure, group) in enumerate(groups.items()):
        lines: dict[tuple[str, str, int | None, bool], list[tuple[tuple[float, float], Result]]] = {}
        paths: list[str] = []
        for result in group:
            place = facts.bnr_range(result.bnr)
            if place is None:
                paths.append(f"{result.network}, BNR {result.bnr or 'not told'}: {distance(result.frechet)}")
            else:
                line = (result.network, result.method, result.nfe, any(result is final for final in finals))
                lines.setdefault(line, []).append((place, result))
        methods = sorted({method for _, method, _, own in lines if not own})
        series = [
            _line(looks[network], sorted(points), "" if own else sampler(method, nfe), own, methods)
            for (network, method, nfe, own), points in lines.items()
        ]
        owns = sorted({sampler(method, nfe) for _, method, nfe, own in lines if own})
        note = f"The large marks: {' and '.join(owns)}." if owns else ""
        note += f" Not one number, so not on the axis: {'; '.join(paths)}." if paths else ""
        if series:
            svg = charts.distances(f"bnr{k}", series, group[0].name, _floors(group), bnr=True)
            out.append(_distance_chart(f"{group[0].name} over BNR", measure, group, svg, note.strip()))
    return out


def _line(
    look: Look, points: Sequence[tuple[tuple[float, float], Result]], label: str, own: bool, methods: Sequence[str]
) -> Series:
    places = [place for place, _ in points]
    middles = [((low + high) / 2, result.frechet) for (low, high), result in points]
    spreads = [result.spread for _, result in points]
    dashes = "-" if own else _DASHES[methods.index(points[0][1].method) % len(_DASHES)]
    return Series(look, middles, spreads, label, dashes, own, places)


def sample_grids(folder: Path) -> list[Picture]:
    """At most 12 of the run's grids by rising nimg, evenly chosen, the first and the newest among them."""
    paths = sorted(path for path in (folder / "samples").glob("*.png") if path.stem.isdecimal())
    count = min(MOST_STEPS, len(paths))
    chosen = [paths[round(k * (len(paths) - 1) / max(count - 1, 1))] for k in range(count)]
    return [picture for path in chosen if (picture := _picture(path)) is not None]


def _picture(path: Path) -> Picture | None:
    """None for a file that does not decode."""
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
    """As a label says it: `heun, NFE 35`."""
    return f"{method or 'sampler not told'}, NFE {nfe or 'not told'}"


def number(value: float | None, form: str = ".4g") -> str:
    """Four significant digits, or as the format says; a dash for what is not known."""
    return "—" if value is None else format(value, form)


def distance(value: float | None) -> str:
    """A Fréchet distance as the field writes it, two decimals; large ones as whole numbers."""
    return "—" if value is None else f"{value:.2f}" if abs(value) < 1000 else grouped(value)


def grouped(value: float | None) -> str:
    """A whole number with a thin space between thousands."""
    return "—" if value is None else f"{round(value):,}".replace(",", "\u202f")


def _digest(text: str) -> str:
    """A script's hash as a Content-Security-Policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
