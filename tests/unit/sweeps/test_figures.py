"""The pictures of a sweep: what stands where, and that whatever came of the trials can be drawn."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.outcomes import POWER, TOTAL, outcome
from warm_dist.sweeps.figure_axes import log_places
from warm_dist.sweeps.figures import bnr_curve, bnr_figure, curves, curves_figure
from warm_dist.sweeps.ranking import Outcome

DRAW: tuple[Callable[[Sequence[Outcome], Path], bool], ...] = (bnr_curve, curves)
BNRS = (0.0, 0.1, 0.5, 2.0)
MEANS = {0.0: 50.0, 0.1: 40.0, 0.5: 31.0, 2.0: 34.0}
GRID = [
    outcome(f"bnr={bnr},seed={seed}", (50, 90.0), (TOTAL, MEANS[bnr] + seed - 1), bnr=bnr, seed=seed)
    for bnr in BNRS
    for seed in range(3)
]


def search(n: int) -> list[Outcome]:
    """A random search of n trials, of which some were stopped and some failed."""
    rng, out = random.Random(0), []
    for k in range(n):
        bnr = 10 ** rng.uniform(-2, 1) if k % 9 else 0.0
        values = {"process.bnr": bnr, "loss.p_mean": rng.uniform(-2, 0), "train.lr": 10 ** rng.uniform(-4, -2)}
        state = ("finished", "finished", "stopped", "failed", "unfinished")[k % 5]
        points = [(nimg, 3000 / nimg + rng.uniform(0, 9)) for nimg in (25, 50, 75, TOTAL)]
        shown = points if state == "finished" else points[: k % 4]
        out.append(outcome(f"trial {k} {'x' * 99}", *shown, state=state, bnr=bnr, values=values))
    return out


def series(axes: Any, linestyle: str) -> list[tuple[list[float], list[float]]]:
    """Of the lines of a style."""
    lines = [line for line in axes.get_lines() if line.get_linestyle() == linestyle and len(line.get_xdata())]
    return [([*map(float, line.get_xdata())], [*map(float, line.get_ydata())]) for line in lines]


def labels(legend: Any) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_the_bnr_curve_shows_means_deviations_and_seeds() -> None:
    figure = bnr_figure(GRID)
    assert figure is not None
    (axes,) = figure.axes
    places = log_places(BNRS)
    assert series(axes, "--") == [([places[0.0], -1.0], [50.0, 40.0])], "from 0, which a log axis lacks, dashed"
    assert series(axes, "-") == [([places[bnr] for bnr in BNRS[1:]], [40.0, 31.0, 34.0])]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "0.1", "0.5", "2"]
    assert list(axes.get_xticks()) == list(places.values())
    bars = [bar.get_segments()[0][:, 1].tolist() for container in axes.containers for bar in container[2]]
    assert bars == [[mean - statistics.stdev([0, 1, 2]), mean + 1] for mean in MEANS.values()]
    dots = [sorted(line.get_ydata()) for line in axes.get_lines() if len(line.get_xdata()) == 3 and line.get_alpha()]
    assert dots == [[mean - 1, mean, mean + 1] for mean in MEANS.values()]
    assert labels(axes.get_legend()) == [
        "mean ± std over seeds", "best: BNR 0.5, 31.00 ± 1.00", "floor 6.5 (real against real, below)",
    ]  # fmt: skip
    assert axes.get_ylabel() == "FID"
    assert [text.get_text() for text in axes.texts] == ["//"], "the axis is broken"


def test_a_near_floor_is_in_the_picture() -> None:
    near = bnr_figure([outcome(str(bnr), (TOTAL, 6.0 + bnr), bnr=bnr) for bnr in (1.0, 2.0)])
    assert near is not None
    assert near.axes[0].get_ylim()[0] < 6.5
    assert "floor 6.5 (real against real)" in labels(near.axes[0].get_legend())


def test_each_other_setting_has_a_curve() -> None:
    def grid(num_lr: int) -> list[Outcome]:
        lrs = [10.0**-k for k in range(num_lr)]
        return [
            outcome(f"{bnr} {lr}", (TOTAL, 10 + bnr + k), bnr=bnr, values={"process.bnr": bnr, "train.lr": lr})
            for bnr in (0.5, 1.0)
            for k, lr in enumerate(lrs)
        ]

    figure = bnr_figure([*grid(3), outcome("alone", (TOTAL, 9.0), bnr=2.0, values={"process.bnr": 2.0, "train.lr": 7})])
    assert figure is not None
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "lr"
    assert labels(legend)[:5] == ["1", "0.1", "0.01", "1 other settings", "best: BNR 2, 9.00"]
    assert [y for _, y in series(figure.axes[0], "-")][1:] == [[10.5, 11.0], [11.5, 12.0], [12.5, 13.0]]
    many = bnr_figure(grid(12))
    assert many is not None
    assert labels(many.axes[0].get_legend())[7:9] == ["1e-07", "4 other settings"]


def test_a_recipe_without_all_its_seeds_is_hollow() -> None:
    figure = bnr_figure([*GRID, outcome("more", (50, 1.0), state="stopped", bnr=2.0, seed=3)])
    assert figure is not None
    faces = [container[0].get_markerfacecolor() for container in figure.axes[0].containers]
    assert [face == "white" for face in faces] == [False, False, False, True]
    assert "hollow: not every seed finished" in labels(figure.axes[0].get_legend())


def test_the_curves_end_as_the_trials_did() -> None:
    trials = [
        outcome("good", (50, 40.0), (TOTAL, 20.0)),
        outcome("worse", (50, 40.0), (75, None), (TOTAL, 30.0), bnr=1.0),
        outcome("stopped", (25, 70.0), (50, 60.0), state="stopped", bnr=2.0),
        outcome("failed", (25, 80.0), state="failed", bnr=4.0),
        outcome("pending", state="unfinished", bnr=8.0),
    ]
    figure = curves_figure(trials)
    assert figure is not None
    (axes,) = figure.axes
    lines = series(axes, "-")
    assert lines == [
        ([50, 100], [40, 20]), ([50, 100], [40, 30]), ([25, 50], [70, 60]), ([25], [80]),
    ]  # fmt: skip
    ends = [line for line in axes.get_lines() if line.get_linestyle() == "None"]
    assert [line.get_marker() for line in ends] == ["o", "o", "x", "X"]
    assert [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in ends] == [
        (x[-1], y[-1]) for x, y in lines
    ]
    assert axes.get_yscale() == "log"
    widths = [line.get_linewidth() for line in axes.get_lines() if line.get_linestyle() == "-"]
    assert widths[0] == max(widths) > widths[1]
    assert labels(figure.legends[0]) == [
        "1.  20.00  0.5", "2.  30.00  1", "3.  60.00  2", "5.  80.00  4", "finished (2)", "stopped early (1)",
        "failed (1)", "without a distance (1)", "floor 6.5 (real against real, below)",
    ]  # fmt: skip
    assert figure.legends[0].get_title().get_text() == "rank.  distance  bnr"


def test_ten_curves_are_named() -> None:
    figure = curves_figure(GRID)
    assert figure is not None
    names = labels(figure.legends[0])
    assert names[0] == "1.  30.00  0.5, 0"
    assert names[9].startswith("10.  ")
    assert names[10:12] == ["others (2)", "finished (12)"]
    assert "seed" in figure.legends[0].get_title().get_text()
    colours = {line.get_color() for line in figure.axes[0].get_lines() if line.get_linestyle() == "-"}
    assert len(colours) == 11, "each named one its own, the others one"


def overlaps(texts: Sequence[Any]) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a, b) for k, (a, box) in enumerate(boxes) for b, other in boxes[:k] if box.overlaps(other)]


def test_labels_do_not_overlap() -> None:
    for trials in (GRID, search(60), search(300)):
        for figure in (bnr_figure(trials), curves_figure(trials)):
            assert figure is not None
            figure.canvas.draw()
            for axes in figure.axes:
                assert not overlaps(axes.get_xticklabels())
                assert not overlaps(axes.get_yticklabels())
                assert not overlaps(axes.texts)
                minor = [*axes.xaxis.get_ticklabels(minor=True), *axes.yaxis.get_ticklabels(minor=True)]
                assert not any(label.get_text() for label in minor), "they would overlap the others"
                assert not len(axes.yaxis.get_minorticklocs())
                assert len(axes.get_xticklabels() + axes.get_yticklabels()) > 1


WILD = {
    "one": [GRID[0]],
    "not finite": [outcome("a", (TOTAL, math.nan)), outcome("b", (TOTAL, None), bnr=1.0), outcome("c", (9, math.inf))],
    "in part finite": [
        *GRID[:4],
        outcome("a", (50, 3.0), (TOTAL, math.nan)),
        outcome("b", (9, math.inf), (TOTAL, 4.0)),
    ],
    "equal": [outcome(str(bnr), (TOTAL, 30.0), bnr=bnr) for bnr in BNRS],
    "not positive": [outcome("a", (50, 9.0), (TOTAL, 0.0)), outcome("b", (TOTAL, -0.1), bnr=1.0)],
    "huge": [*GRID, outcome("a", (TOTAL, 1e12), bnr=7.0)],
    "no floor": [outcome(str(bnr), (TOTAL, 30.0 + bnr), bnr=bnr, floor=None) for bnr in BNRS],
    "paths": [outcome("a", (TOTAL, 3.0), bnr=POWER), outcome("b", (TOTAL, 4.0)), outcome("c", (TOTAL, 4.0), bnr=1.0)],
    "sixty": search(60),
}


@pytest.mark.parametrize("name", WILD)
def test_whatever_came_of_the_trials_is_drawn(name: str, tmp_path: Path) -> None:
    for draw in DRAW:
        path = tmp_path / f"{draw.__name__}.png"
        assert draw(WILD[name], path) == path.exists()
        if path.exists():
            with Image.open(path) as image:
                assert image.format == "PNG"
                assert 600 < image.width < 3000
                assert 500 < image.height < 1000
                colours = image.convert("RGB").getcolors(image.width * image.height)
                assert colours is not None
                assert len(colours) > 50, "not an empty page"
    written = {path.stem for path in tmp_path.iterdir()}
    nothing = {"one": {"bnr_curve"}, "not finite": {"bnr_curve", "curves"}}
    assert written == {"bnr_curve", "curves"} - nothing.get(name, set())


@pytest.mark.parametrize("draw", DRAW)
def test_nothing_to_draw_writes_nothing(draw: Callable[[Sequence[Outcome], Path], bool], tmp_path: Path) -> None:
    for trials in ([], [outcome("a", state="failed"), outcome("b", state="failed", bnr=1.0)]):
        assert not draw(trials, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
