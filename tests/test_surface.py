"""The NFE x BNR surface: which cells stand together, and a picture of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from warm_dist.evaluation.surface_figure import draw, panels
from warm_dist.evaluation.surface_table import points, text


def line(bnr: str, nfe: int, frechet: float | None, weights: str = "a", **more: Any) -> dict[str, Any]:
    found = {"weights": weights, "bnr": bnr, "nfe": nfe, "frechet": frechet, "spread": 0.5, "floor": 10.0}
    found |= {"method": "heun", "measure": "m", "name": "Fréchet distance (lite0)", "recipe": weights, "spec": bnr}
    return found | {"seed": 0} | more


GRID = [line(bnr, nfe, 20.0 + nfe + 3 * k) for k, bnr in enumerate(("10", "0", "0.5")) for nfe in (35, 9)]


def test_rows_and_columns_rise() -> None:
    (panel,) = panels(GRID)
    assert (panel.bnr, panel.nfe) == (("0", "0.5", "10"), (9, 35))
    assert panel.cells["0.5", 9]["frechet"] == 35
    (panel,) = panels([line("power(0.5, 0.2)", 9, 1.0), *GRID])
    assert panel.bnr[-1] == "power(0.5, 0.2)", "paths that are no number come last"


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


def test_mlflow_gets_a_curve_over_nfe_for_each_bnr() -> None:
    found = points([*GRID, line("table, 3 points", 9, 7.0), line("2", 9, None)])
    assert found["frechet/heun/bnr_0.5", 35] == 61.0
    assert found["floor/heun/bnr_0", 9] == 10.0
    assert ("frechet/heun/bnr_table_ 3 points", 9) in found, "what MLflow takes in a name"
    assert not [point for point in found if point[0] == "frechet/heun/bnr_2"]


def test_the_table_says_what_is_not_finite_and_averages_seeds() -> None:
    two = [line("0.5", 9, 20.0, "run/a", recipe="r", seed=0), line("0.5", 9, 22.0, "run/b", recipe="r", seed=1)]
    rows = text([*two, line("1", 9, None, "run/c")]).splitlines()
    assert len(rows) == 1 + 3 + 1
    assert "20.00  ± 0.50   10.00" in rows[1]
    assert "not finite" in rows[3]
    assert rows[4].startswith("2 seeds as run/a")
    assert "21.00 ± 1.41   20.00 … 22.00" in rows[4]
