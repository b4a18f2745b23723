"""The table of an evaluation: its text, and MLflow's curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.surfaces import GRID, line
from warm_dist.errors import DataError
from warm_dist.evaluation.surface import cells_text, mlflow_points, open_results
from warm_dist.runs.folder import write_results


def test_mlflow_gets_a_curve_over_nfe_for_each_bnr() -> None:
    found = mlflow_points([*GRID, line("table, 3 points", 9, 7.0), line("2", 9, None)])
    assert found["frechet/heun/bnr_0.5", 35] == 61.0
    assert found["floor/heun/bnr_0", 9] == 10.0
    assert ("frechet/heun/bnr_table_ 3 points", 9) in found, "what MLflow takes in a name"
    assert not [point for point in found if point[0] == "frechet/heun/bnr_2"]


def test_the_table_says_what_is_not_finite_and_averages_seeds() -> None:
    two = [line("0.5", 9, 20.0, "run/a", recipe="r", seed=0), line("0.5", 9, 22.0, "run/b", recipe="r", seed=1)]
    rows = cells_text([*two, line("1", 9, None, "run/c")]).splitlines()
    assert len(rows) == 1 + 3 + 1
    assert "20.00  ± 0.50   10.00" in rows[1]
    assert "not finite" in rows[3]
    assert rows[4].startswith("2 seeds as run/a")
    assert "21.00 ± 1.41   20.00 … 22.00" in rows[4]


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    """Fault: what lies in results.json and is no cell is overwritten, or ends in a KeyError."""
    assert open_results(tmp_path) == {}
    cell = dict.fromkeys(("weights", "sha256", "sampler", "bnr", "method", "name", "spec", "measure"), "a")
    cell |= {"per_block": [{"frechet": 1.0}], "frechet": 1.0, "nfe": 9, "num_images": 64}
    write_results(tmp_path, {"a": cell})
    assert open_results(tmp_path) == {"a": cell}
    for odd in (
        {"x": {"frechet": 1}},
        {"a": cell, "x": {"frechet": 1}},
        {"a": {"per_block": []}},
        {"a": cell | {"per_block": 3}},
        [1],
        7,
    ):
        (tmp_path / "results.json").write_text(json.dumps(odd))
        with pytest.raises(DataError, match=r"results\.json: not written by this command, or damaged; move it away"):
            open_results(tmp_path)
