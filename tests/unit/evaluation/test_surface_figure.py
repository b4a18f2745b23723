"""The NFE x BNR surface: which cells stand together, and a picture of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.surfaces import GRID, line
from warm_dist.evaluation.surface_figure import draw, panels


def test_rows_and_columns_rise() -> None:
    """Fault: rows and columns stand in the order in which the cells were measured."""
    (panel,) = panels(GRID)
    assert (panel.bnr, panel.nfe) == (("0", "0.5", "10"), (9, 35))
    assert panel.cells["0.5", 9]["frechet"] == 35
    (panel,) = panels([line("power(0.5, 0.2)", 9, 1.0), line("2", 9, 1.0), *GRID])
    assert panel.bnr == ("0", "0.5", "2", "10", "power(0.5, 0.2)"), "numbers rise; paths that are none come last"


def test_networks_share_a_panel_unless_they_have_the_same_cell() -> None:
    (together,) = panels([line("0.1", 9, 1.0, "a"), line("0.5", 9, 2.0, "b"), line("0.5", 35, 2.0, "b")])
    assert "2 networks" in together.title
    assert len(together.cells) == 3
    apart = panels([line("0.5", 9, 1.0, "a"), line("0.5", 9, 2.0, "b")])
    assert [(panel.title[-1], len(panel.cells)) for panel in apart] == [("a", 1), ("b", 1)]


def test_other_measures_and_methods_never_share_a_panel() -> None:
    lines = [line("0.5", 9, 1.0), line("1", 9, 1.0, measure="n"), line("2", 9, 1.0, method="multistep")]
    assert [len(panel.cells) for panel in panels(lines)] == [1, 1, 1]


def test_a_picture_of_whatever_there_is(tmp_path: Path) -> None:
    """Fault: a missing cell, or one without floor, spread or finite distance, ends the drawing."""
    whole, holes = tmp_path / "whole.png", tmp_path / "holes.png"
    draw(panels(GRID), whole)
    wild = line("2", 9, None)
    del wild["floor"], wild["spread"]
    draw(panels([*GRID[:3], wild, line("cold", 35, 4.0, spread=None)]), holes)
    for path in (whole, holes):
        with Image.open(path) as image:
            assert image.width == 1760
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100, "not an empty page"
    draw(panels([wild]), holes)  # nothing finite at all
