"""The charts of the page: axes, colours, error bars, thinning."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.report_runs import grids
from warm_dist.report import charts, facts
from warm_dist.report.page import MOST_STEPS, sample_grids


@pytest.mark.parametrize(("text", "place"), [("0", (0, 0)), ("0.5", (0.5, 0.5)), ("uniform 0..2", (0, 2)),
                         ("log_uniform(low 0.05, high 2.0)", (0.05, 2)), ("cold(sigma 0.02)", None), ("nan", None)])  # fmt: skip
def test_where_a_bnr_stands_on_the_axis(text: str, place: Any) -> None:
    """Fault: a range stands at one number, or a path that is no number at the first number in its name."""
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
    css = (ROOT / "warm_dist/report/page.html.j2").read_text()
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


def test_smoothing_keeps_a_constant_and_the_start() -> None:
    assert charts.smooth([(k, 3.0) for k in range(100)]) == [(k, 3.0) for k in range(100)]
    assert charts.smooth([(0, 100.0), *((k, 0.0) for k in range(1, 100))])[0] == (0, 100.0)


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
