"""The page that compares runs: its facts, its ranks, what it must never hold; test_report_page.py looks at it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from launch import report as command
from tests.support.commands import call
from tests.support.report_runs import EVIL, Made, evaluated, make_run, write_lines
from warm_dist.errors import ConfigError, OutputError
from warm_dist.figures import save_grid
from warm_dist.report import facts
from warm_dist.report.page import render, sample_grids, shown_facts, write_report


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


def test_one_chart_a_measure(made: Made) -> None:
    """Fault: distances of two measures, which cannot be compared, in one chart."""
    page = shown_facts(made.runs, [made.evaluation])
    charts = [chart for chart in page["curves"] if chart.measure]
    assert [chart.measure for chart in charts] == ["aaaa11112222", "bbbb33334444"]
    assert [chart.measure for chart in page["bnr_charts"]] == ["aaaa11112222", "bbbb33334444"]
    looks = page["looks"]
    assert looks[EVIL].colour in charts[1].svg
    assert not any(looks[EVIL].colour in chart.svg for chart in (charts[0], page["bnr_charts"][0]))
    assert "lowest 26.75, mid at BNR 0.5. Floor 14.26" in charts[0].summary


def test_credentials_stay_out_of_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **{"data.endpoint_url": "http://10.0.0.1:9000/"})
    tree = json.loads((run / "config.json").read_text())  # of before, when it could hold credentials
    tree["data"]["endpoint_url"] = "http://user:hunter2@10.0.0.1:9000/?X-Amz-Signature=abcdef"
    (run / "config.json").write_text(json.dumps(tree))
    (run / "exit.json").write_text(json.dumps({"code": 11, "reason": "no answer from http://user:hunter2@10.0.0.1/"}))
    text = render(shown_facts([run], []))
    assert "10.0.0.1:9000" in text
    assert "hunter2" not in text
    assert "abcdef" not in text


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
            evaluated(9, 12.0, spread=None, floor=None, blocks=None, bnr="table(…)", nfe=None, method=""),
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


def test_a_wide_grid_is_shrunk(tmp_path: Path) -> None:
    save_grid(np.zeros((64, 1, 256, 256), np.uint8), tmp_path / "samples" / "000000000000.png", columns=8)
    (picture,) = sample_grids(tmp_path)
    assert (picture.width, picture.height) == (1024, 1024)


def test_what_is_no_run_is_refused_and_nothing_is_written(made: Made, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'folder'}: not a run"):
        call(command.main, made.runs[0], tmp_path / "folder", "--out", tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(ConfigError, match="not an evaluation"):
        write_report(made.runs, [tmp_path], tmp_path / "page.html")


def test_the_command_replaces_the_page_as_a_whole(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    out.write_text("before")
    assert call(command.main, made.runs[0], made.runs[1], "--evaluation", made.evaluation, "--out", out) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"{out}: 2 runs, ")
    assert out.read_text().rstrip().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(made.runs, [], tmp_path / "file" / "page.html")
