"""The page that compares runs: its facts, its ranks, what it must never hold; test_report_page.py looks at it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import ROOT
from tests.report_runs import EVIL, Made, evaluated, grids, make, make_run, write_lines
from warm_dist.errors import ConfigError, OutputError
from warm_dist.figures import save_grid
from warm_dist.report import charts, facts
from warm_dist.report.page import MOST_STEPS, render, sample_grids, shown_facts, write_report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("report"))


class Links(HTMLParser):
    """Every attribute by which an HTML page may load something, and every element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        wanted = ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background")
        self.urls += [value or "" for key, value in attrs if key in wanted]


def test_the_page_loads_nothing_but_itself(made: Made) -> None:
    text = made.page.read_text()
    links = Links(text)
    assert {url[:5] for url in links.urls if not url.startswith("#")} == {"data:"}
    assert not {"link", "iframe", "object", "embed", "base"} & set(links.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)), "ids of several charts must not meet"


def test_a_runs_name_is_text_and_never_markup(made: Made) -> None:
    text = made.page.read_text()
    assert EVIL not in text
    assert "&lt;img src=x" in text
    assert Links(text).urls.count("x") == 0


def test_only_runs_of_one_measure_are_ranked(made: Made) -> None:
    groups = shown_facts(made.runs, [])["groups"]
    ranks = {(group["measure"], row["result"].network): row["rank"] for group in groups for row in group["rows"]}
    assert ranks == {("aaaa11112222", "low"): "", ("aaaa11112222", "mid"): "best", ("bbbb33334444", EVIL): ""}


def test_one_chart_a_measure(made: Made) -> None:
    page = shown_facts(made.runs, [made.evaluation])
    charts = [chart for chart in page["curves"] if chart.measure]
    assert [chart.measure for chart in charts] == ["aaaa11112222", "bbbb33334444"]
    assert [chart.measure for chart in page["bnr_charts"]] == ["aaaa11112222", "bbbb33334444"]
    looks = page["looks"]
    assert looks[EVIL].colour in charts[1].svg
    assert not any(looks[EVIL].colour in chart.svg for chart in (charts[0], page["bnr_charts"][0]))
    assert "lowest 26.75, mid at BNR 0.5. Floor 14.26" in charts[0].summary


def test_old_lines_without_a_measure_go_by_their_spec(tmp_path: Path) -> None:
    old = [make_run(tmp_path / name, lines=[evaluated(0, 20.0, spec=spec)]) for name, spec in (("a", "1"), ("b", "2"))]
    for run in old:
        line = json.loads((run / "metrics.jsonl").read_text())
        write_lines(run, [{key: value for key, value in line.items() if key not in ("measure", "bnr", "method")}])
    groups = shown_facts(old, [])["groups"]
    assert [group["measure"] for group in groups] == ["1", "2"]
    assert groups[0]["rows"][0]["result"][2:4] == ("0.5", "ancestral"), "the config says what the line does not"


def test_no_further_than_the_spread_is_not_worse() -> None:
    line = facts._result(evaluated(0, 20.0), "a")
    assert line is not None
    results = [
        line._replace(frechet=value, spread=spread) for value, spread in ((20.0, 0.5), (20.5, None), (20.6, 0.1))
    ]
    assert facts.ranks(results) == ["best", "within spread", ""]
    assert facts.ranks(results[:1]) == [""], "nothing to be better than"


def test_the_evaluations_table_is_nfe_by_bnr(made: Made) -> None:
    (table,) = shown_facts(made.runs, [made.evaluation])["matrices"]
    assert table["network"] == "mid", "known by its folder"
    assert table["columns"] == ["0", "0.5", "2"]
    values = {how: [cell[0][0].frechet for cell in cells] for how, cells in table["rows"]}
    assert values == {
        ("ancestral", 9): [20 + 100 / 9 + b for b in (0, 0.5, 2)],
        ("ancestral", 35): [20 + 100 / 35 + b for b in (0, 0.5, 2)],
    }
    assert [cell[0][1] for _, cells in table["rows"] for cell in cells].index("best") == 3


def test_differing_keys_exactly() -> None:
    trees = [
        {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": None},
        {"a": 1, "b": {"c": 2.5, "d": [1, 2]}, "e": None, "f": "x"},
    ]
    assert facts.differing(trees) == {"b.c": ["2", "2.5"], "f": [None, '"x"']}
    assert facts.differing([trees[0], trees[0]]) == {}


def test_credentials_stay_out_of_the_page(tmp_path: Path) -> None:
    url = {"data.endpoint_url": "http://user:hunter2@10.0.0.1:9000/?X-Amz-Signature=abcdef"}
    run = make_run(tmp_path / "run", **url)
    (run / "exit.json").write_text(json.dumps({"code": 11, "reason": "no answer from http://user:hunter2@10.0.0.1/"}))
    text = render(shown_facts([run], []))
    assert "10.0.0.1:9000" in text
    assert "hunter2" not in text
    assert "abcdef" not in text


def test_names_are_unique_and_a_folder_counts_once(tmp_path: Path) -> None:
    for name in ("x/a/run", "y/a/run", "y/b/run", "z/other"):
        make_run(tmp_path / name)
    runs = facts.read_runs(tmp_path / name for name in ("x/a/run", "y/a/run", "y/b/run", "z/other", "z/../z/other"))
    assert [run.name for run in runs] == ["x/a/run", "y/a/run", "b/run", "other"]


def test_an_empty_or_odd_run_still_has_a_page(tmp_path: Path) -> None:
    nan = float("nan")
    odd = make_run(tmp_path / "odd", {"kind": "of a later version"})
    (odd / "run.json").write_text("{")
    (odd / "samples").mkdir()
    (odd / "samples" / "000000000100.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    write_lines(
        odd,
        [
            {"nimg": 0, "kind": "train", "loss": nan, "lr": None, "images_per_s": "fast"},
            {"nimg": 5, "kind": "system"},
            evaluated(7, None),
            evaluated(8, nan),
            evaluated(9, 12.0, spread=nan, floor=None, blocks=[1.0, 2.0], bnr="table(…)", nfe=None, method=None),
        ],
        tail='{"time": 1.7e9, "attempt": 1, "ni',
    )
    twice = make_run(tmp_path / "twice")
    write_lines(twice, [evaluated(9, 50.0), evaluated(9, 40.0, attempt=2), evaluated(20, 0.0, floor=0.0)])
    bare = make_run(tmp_path / "bare")
    page = shown_facts([odd, twice, bare], [])
    assert [chart.note for chart in page["bnr_charts"]] == ["The large marks: ancestral, NFE 35. Not one number, so not on the axis: odd, BNR table(…): 12.00."]  # fmt: skip
    assert [run["name"] for run in page["unmeasured"]] == ["bare"]
    assert [run["state"] for run in page["runs"]] == ["under way"] * 3
    (second,) = facts.read_runs([twice])
    assert [result.frechet for result in second.results()] == [40.0, 0.0], "the higher attempt's"
    for runs in ([odd, twice, bare], [odd], [bare]):
        assert render(shown_facts(runs, [])).rstrip().endswith("</html>")


@pytest.mark.parametrize(("text", "place"), [("0", (0, 0)), ("0.5", (0.5, 0.5)), ("uniform 0..2", (0, 2)),
                         ("log_uniform(low 0.05, high 2.0)", (0.05, 2)), ("cold(sigma 0.02)", None), ("nan", None)])  # fmt: skip
def test_where_a_bnr_stands_on_the_axis(text: str, place: Any) -> None:
    assert facts.bnr_range(text) == place


def test_the_bnr_axis_is_logarithmic_and_has_a_place_for_zero() -> None:
    points = [(0.0, 3.0), (0.1, 2.0), (0.5, 1.0), (2.0, 2.0)]
    svg = charts.distances("k", [charts.Series(charts.look(0), points)], "y", [], bnr=True)
    ticks = {text: float(x) for x, text in re.findall(r'text-anchor: middle[^>]* x="([\d.]+)"[^>]*>([\d.]+)<', svg)}
    assert list(ticks) == ["0", "0.1", "0.5", "2"]
    zero, tenth, half, two = ticks.values()
    assert (two - half) / (half - tenth) == pytest.approx(
        math.log(4) / math.log(5), abs=1e-4
    )  # coordinates have 6 decimals
    assert tenth - zero > 20, "points, so that the labels do not meet"


def test_every_colour_can_be_seen_on_both_grounds() -> None:
    css = (ROOT / "warm_dist/report.html.j2").read_text()
    grounds = [charts.luminance(colour) for colour in re.findall(r"--ground: (#\w{6})", css)]
    inks = [charts.luminance(colour) for colour in re.findall(r"--(?:ink|soft): (#\w{6})", css)]

    def contrast(a: float, b: float) -> float:
        return (max(a, b) + 0.05) / (min(a, b) + 0.05)

    looks = [charts.look(k) for k in range(24)]
    assert len({one.colour for one in looks}) == 24
    assert all(contrast(charts.luminance(one.colour), ground) >= 3 for one in looks for ground in grounds)
    assert all(contrast(ink, grounds[k // 2]) >= 4.5 for k, ink in enumerate(inks)), "WCAG AA for text"
    assert len(grounds) == 2
    assert len(inks) == 4


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    points = [(float(k), float(k % 2)) for k in range(100_000)]
    thinned = charts.thin(points)
    assert len(thinned) <= 300
    assert thinned[-1][0] == 99_999
    assert {round(y, 1) for _, y in thinned} == {0.5}, "means, no picking"
    grids(tmp_path, tuple(range(0, 1700, 100)), 0)
    assert [picture.nimg for picture in sample_grids(tmp_path)][:: MOST_STEPS - 1] == [0, 1600]
    assert len(sample_grids(tmp_path)) == MOST_STEPS


def test_a_wide_grid_is_shrunk(tmp_path: Path) -> None:
    save_grid(np.zeros((64, 1, 256, 256), np.uint8), tmp_path / "samples" / "000000000000.png", columns=8)
    (picture,) = sample_grids(tmp_path)
    assert (picture.width, picture.height) == (1024, 1024)


def test_smoothing_keeps_a_constant_and_the_start() -> None:
    assert charts.smooth([(k, 3.0) for k in range(100)]) == [(k, 3.0) for k in range(100)]
    assert charts.smooth([(0, 100.0), *((k, 0.0) for k in range(1, 100))])[0] == (0, 100.0)


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "launch/report.py", *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip


def test_what_is_no_run_is_exit_2_and_nothing_is_written(made: Made, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = command(made.runs[0], tmp_path / "folder", "--out", tmp_path / "page.html")
    assert done.returncode == 2
    assert done.stderr.startswith(f"ConfigError: {tmp_path / 'folder'}: not a run")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(ConfigError, match="not an evaluation"):
        write_report(made.runs, [tmp_path], tmp_path / "page.html")


def test_the_command_replaces_the_page_as_a_whole(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("before")
    done = command(made.runs[0], made.runs[1], "--evaluation", made.evaluation, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out}: 2 runs, ")
    assert out.read_text().rstrip().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(made.runs, [], tmp_path / "file" / "page.html")


def test_ticks_of_a_narrow_axis_differ() -> None:
    assert [charts.count(value) for value in (201.25, 201.5, 0.1 + 0.2, 1500, 44_800, 2e6)] == [
        "201.25", "201.5", "0.3", "1.5k", "44.8k", "2M",
    ]  # fmt: skip


def test_an_error_bar_is_as_long_as_its_spread() -> None:
    points = [(0.5, 10.0), (1.0, 10.0), (2.0, 10.0)]
    series = charts.Series(charts.look(0), points, [1.0, None, 2.0])
    svg = charts.distances("k", [series], "y", [8.0], bnr=True)
    bars = re.search(r'<g id="k-LineCollection_1">(.*?)</g>', svg, re.S)
    assert bars is not None
    ends = re.findall(r"M \S+ (\S+) \nL \S+ (\S+) ", bars[1])
    lengths = [float(low) - float(high) for low, high in ends]
    assert lengths == pytest.approx([lengths[0], 0.0, 2 * lengths[0]], abs=1e-4)
    assert lengths[0] > 1
    assert "floor 8<" in svg
