"""What runs and evaluations say: read, compared and ranked."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.report_runs import EVIL, Made, evaluated, make_run, write_lines
from warm_dist.report import facts
from warm_dist.report.page import shown_facts


def test_only_runs_of_one_measure_are_ranked(made: Made) -> None:
    groups = shown_facts(made.runs, [])["groups"]
    ranks = {(group["measure"], row["result"].network): row["rank"] for group in groups for row in group["rows"]}
    assert ranks == {("aaaa11112222", "low"): "", ("aaaa11112222", "mid"): "best", ("bbbb33334444", EVIL): ""}


def test_a_run_that_was_stopped_has_not_failed(made: Made) -> None:
    """Fault: a run that was stopped, which the same command resumes, is shown as failed."""
    status = [run.status() for run in facts.read_runs(made.runs)]
    assert status[:2] == [("finished", ""), ("stopped", "exit code 75: Stopped: SIGTERM")]
    assert status[2][0] == "under way"


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
    """Fault: a nested key, or one that only one of the configs has, is left out."""
    trees = [
        {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": None},
        {"a": 1, "b": {"c": 2.5, "d": [1, 2]}, "e": None, "f": "x"},
    ]
    assert facts.differing(trees) == {"b.c": ["2", "2.5"], "f": [None, '"x"']}
    assert facts.differing([trees[0], trees[0]]) == {}


def test_names_are_unique_and_a_folder_counts_once(tmp_path: Path) -> None:
    for name in ("x/a/run", "y/a/run", "y/b/run", "z/other"):
        make_run(tmp_path / name)
    runs = facts.read_runs(tmp_path / name for name in ("x/a/run", "y/a/run", "y/b/run", "z/other", "z/../z/other"))
    assert [run.name for run in runs] == ["x/a/run", "y/a/run", "b/run", "other"]
