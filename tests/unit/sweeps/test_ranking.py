"""What came of a sweep: ranking, means over seeds, and the tables for people and for programs."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.outcomes import POWER, TOTAL, outcome
from warm_dist.errors import ConfigError, OutputError
from warm_dist.sweeps.ranking import Outcome, best, groups, headings, ranked, short
from warm_dist.sweeps.results_table import text, write_csv, write_parquet

ORDER = [
    outcome("a", (50, 90.0), (TOTAL, 20.0)),
    outcome("b", (50, 10.0), (TOTAL, 30.0)),  # its last distance counts, not its lowest
    outcome("c", (TOTAL, 30.0)),  # a tie: by name
    outcome("wild", (TOTAL, math.nan)),
    outcome("wilder", (50, 1.0), (TOTAL, None)),
    outcome("stopped far", (80, 99.0), state="stopped"),
    outcome("stopped near, worse", (50, 5.0), state="stopped"),
    outcome("stopped near, worst", (50, 6.0), state="stopped"),
    outcome("interrupted", (10, 2.0), state="unfinished"),
    outcome("pending", state="unfinished"),
    outcome("failed late", (90, 1.0), state="failed"),
    outcome("failed early", state="failed"),
]


@given(st.permutations(ORDER))
def test_the_ranking_is_the_same_from_any_order(shuffled: list[Outcome]) -> None:
    assert [one.name for one in ranked(shuffled)] == [one.name for one in ORDER]


numbers = st.none() | st.sampled_from([math.nan, math.inf]) | st.floats(-1e90, 1e90) | st.integers(-5, 5).map(float)
anything = st.builds(
    lambda name, distances, state, seed, bnr: outcome(
        name, *[(TOTAL - k, x) for k, x in reversed(list(enumerate(distances)))], state=state, seed=seed, bnr=bnr
    ),
    st.uuids().map(str),
    st.lists(numbers, max_size=3),
    st.sampled_from(["finished", "stopped", "failed", "unfinished"]),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.5, 2.0]),
)


@given(st.lists(anything, max_size=8, unique_by=lambda one: one.name), st.randoms())
def test_whatever_the_trials_nothing_is_lost_and_their_order_does_not_matter(
    trials: list[Outcome], random: Any
) -> None:
    shuffled = random.sample(trials, len(trials))
    assert ranked(trials) == ranked(shuffled)
    assert sorted(one.name for one in ranked(trials)) == sorted(one.name for one in trials)
    assert best(trials) == best(shuffled)
    assert text(trials) == text(shuffled)
    assert all(len(line) <= 120 and line == line.rstrip() for line in text(trials).splitlines())


def test_the_best_is_a_finished_finite_one_or_none() -> None:
    assert best(ORDER) is ORDER[0]
    assert best(ORDER[3:]) is None, "neither NaN nor a stopped trial wins"
    assert best([]) is None
    early = outcome("early", (50, 1.0))
    assert best([early, ORDER[1]]) is ORDER[1], "finished, yet its last evaluation is not that of the whole training"


def test_numbers_of_two_measures_are_not_compared() -> None:
    other = outcome("other", (TOTAL, 1.0), measure="m2")
    for use in (ranked, best, groups, text):
        with pytest.raises(ConfigError, match=r"2 different measures.*m1 of a, m2 of other"):
            use([ORDER[0], other])


def seeds(prefix: str, bnr: Any, *distances: float | None, state: str = "finished") -> list[Outcome]:
    return [outcome(f"{prefix}{k}", (TOTAL, x), seed=k, bnr=bnr, state=state) for k, x in enumerate(distances)]


def test_a_group_is_the_seeds_of_a_recipe() -> None:
    steady, lucky = seeds("s", 0.5, 21.0, 20.5, 22.0), seeds("l", 2.0, 30.0, 15.0, 29.0)
    first, second = groups([*lucky, *steady])
    assert first.values == {"process.bnr": 0.5}
    assert (first.outcomes, first.seeds) == ((steady[1], steady[0], steady[2]), (1, 0, 2))
    assert first.mean == pytest.approx(statistics.mean([21.0, 20.5, 22.0]), abs=1e-12)  # float64 rounding
    assert first.std == pytest.approx(statistics.stdev([21.0, 20.5, 22.0]), abs=1e-12)
    assert (first.low, first.high, first.missing) == (20.5, 22.0, 0)
    assert second.mean > first.mean
    assert best([*lucky, *steady]) is steady[1], "the recipe with the better mean, not the luckiest seed"
    assert groups(steady[:1])[0].std is None


def test_a_recipe_of_which_a_seed_is_missing_competes_only_with_its_like() -> None:
    steady, thinned = seeds("s", 0.5, 21.0, 22.0), seeds("t", 2.0, 10.0, None)
    first, second = groups([*thinned, *steady])
    assert (first.mean, first.missing) == (21.5, 0)
    assert (second.mean, second.missing) == (10.0, 1)
    assert best([*thinned, *steady]) is steady[0]
    assert best([*thinned, *seeds("u", 1.0, 9.5, None)]).name == "u0", "no recipe is complete"  # type: ignore[union-attr]
    assert groups(seeds("f", 0.5, 1.0, state="failed")) == []


def test_equal_json_is_one_recipe() -> None:
    def count(*bnr: Any) -> int:
        return len(groups([outcome(str(k), (TOTAL, 1.0), values={"key": x}) for k, x in enumerate(bnr)]))

    assert count(0, 0.0) == 1
    assert count(1, True) == 2
    assert count({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}) == 1
    assert count({"a": [1, 2]}, {"a": [2, 1]}) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, "0.5"), (20000.0, "20000"), (44800, "44800"), (0.00083541234, "0.0008354"), (-1.4851234, "-1.485"),
        (0.30000000000000004, "0.3"), (True, "true"), (None, "null"), ("heun", "heun"), ([1, 2.0, 2], "[1 2 2]"),
        (POWER | {"cap": None}, "power(bnr 0.5, exponent 0.2)"), ({"kind": "cold"}, "cold"), ({"a": 1}, "(a 1)"),
    ],
)  # fmt: skip
def test_values_in_short(value: Any, expected: str) -> None:
    """Fault: rounding noise is shown, true becomes 1, or keys that are null are shown."""
    assert short(value) == expected


def test_a_heading_is_the_last_part_unless_two_keys_share_it() -> None:
    assert headings(["process.bnr", "train.lr"]) == ["bnr", "lr"]
    assert headings(["process.bnr", "sampler.bnr", "train.lr"]) == ["process.bnr", "sampler.bnr", "lr"]


def test_the_table_for_people() -> None:
    """Fault: columns are out of line, a failed trial lacks its reason, or a single seed has a second table."""
    trials = [
        outcome("a", (TOTAL, 20.0), bnr=0.5, seed=0, spread=0.25),
        outcome("b", (TOTAL, 22.0), bnr=0.5, seed=1, spread=0.25),
        outcome("c", (TOTAL, None), bnr=0.0),
        outcome("d", (50, 60.0), bnr=POWER, state="stopped"),
        outcome("e", bnr=2.0, state="failed"),
    ]
    assert text(trials) == (
        "3 finished, 1 stopped, 1 failed; FID\n"
        "rank                           bnr  seed     state  nimg     Fréchet  spread  floor\n"
        "   1                           0.5     0  finished   100       20.00  ± 0.25   6.50\n"
        "   2                           0.5     1  finished   100       22.00  ± 0.25   6.50\n"
        "   3                             0     0  finished   100  not finite           6.50\n"
        "   4  power(bnr 0.5, exponent 0.2)     0   stopped    50       60.00           6.50\n"
        "   5                             2     0    failed  NumericsError: not finite\n"
        "\n"
        "over seeds (n), complete recipes first\n"
        "bnr  n   mean     std     low … high\n"
        "0.5  2  21.00  ± 1.41  20.00 … 22.00"
    )
    assert "seed" not in text(trials[2:]), "one seed has no column and no second table"


def test_long_values_and_reasons_are_cut_to_the_width() -> None:
    values = {f"some.key{k}": {"kind": "table", "sigma": list(range(40))} for k in range(6)}
    trials = [outcome("a", (TOTAL, 2.0), values=values), outcome("b", (50, 2.0), state="failed", values=values)]
    trials[1] = replace(trials[1], reason="NumericsError: the loss is not finite at nimg 50\nmore")
    lines = text(trials).splitlines()
    assert [len(line) for line in lines[1:]] == [92, 92, 120]
    assert lines[1].split()[1:7] == [f"key{k}" for k in range(6)]
    assert lines[3].endswith("6.50  NumericsError: the loss i…")


def test_the_csv_has_a_row_for_each_trial_with_its_last_evaluation(tmp_path: Path) -> None:
    trials = [outcome("b", state="failed", bnr=POWER), outcome("a", (50, 9.0), (TOTAL, 7.25), kid=0.5, seed=3)]
    write_csv(trials, tmp_path / "new" / "table.csv")
    with (tmp_path / "new" / "table.csv").open(encoding="utf-8", newline="") as file:
        a, b = csv.DictReader(file)
    assert [a["rank"], a["trial"], a["seed"], a["bnr"], a["process.bnr"]] == ["1", "a", "3", "0.5", "0.5"]
    assert [a["nimg"], a["frechet"], a["spread"], a["kid"]] == ["100", "7.25", "", "0.5"]
    assert [a["sampled_bnr"], a["metric_name"]] == ["0.5", "FID"]
    assert a["time"] == "2023-11-14T22:15:00.125+00:00"
    assert [b["rank"], b["state"], b["reason"]] == ["2", "failed", "NumericsError: not finite\ntraceback"]
    assert b["process.bnr"] == '{"kind":"power","bnr":0.5,"exponent":0.2}'
    assert b["nimg"] == b["frechet"] == b["time"] == ""
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.csv"], "no temporary file is left"


FIXED = [("trial", pa.string()), ("state", pa.string()), ("reason", pa.string()), ("rank", pa.int64()),
         ("seed", pa.int64()), ("total_nimg", pa.int64()), ("bnr", pa.float64()),
         ("log10_bnr", pa.float64())]  # fmt: skip
RECORD = [("nimg", pa.int64()), ("attempt", pa.int64()), ("time", pa.timestamp("ms", tz="UTC")),
          ("frechet", pa.float64()), ("spread", pa.float64()), ("blocks", pa.int64()), ("floor", pa.float64()),
          ("floor_n", pa.int64()), ("kid", pa.float64()), ("precision", pa.float64()), ("recall", pa.float64()),
          ("num_images", pa.int64()), ("nfe", pa.int64()), ("sampled_bnr", pa.string()), ("method", pa.string()),
          ("metric_name", pa.string()), ("spec", pa.string()), ("measure", pa.string()), ("seconds", pa.float64()),
          ("grid", pa.string())]  # fmt: skip


def values(bnr: Any, lr: float, flips: bool, clip: Any, seed: int) -> dict[str, Any]:
    return {"process.bnr": bnr, "train.lr": lr, "train.flips": flips, "train.clip": clip, "train.seed": seed}


def test_the_parquet_file_has_a_row_for_each_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "sweep.parquet"
    trials = [
        outcome("none", bnr=0.0, state="failed", values=values(0, 1, True, None, 0)),
        outcome("two", (50, 9), (TOTAL, 7.25), bnr=0.01, values=values(0.01, 1e-3, False, 1, 2**53 + 1), kid=0.5),
        outcome("wild", (TOTAL, None), bnr=POWER, values=values(POWER, 2e-3, True, 0.5, 1), spread=0.5),
    ]
    write_parquet(trials, path)
    table = pq.read_table(path)
    keys = [("process.bnr", pa.string()), ("train.lr", pa.float64()), ("train.flips", pa.bool_())]
    keys += [("train.clip", pa.float64()), ("train.seed", pa.float64())]
    assert [(field.name, field.type) for field in table.schema] == [*FIXED, *keys, *RECORD]

    record = {name: None for name, _ in RECORD}
    known = {"attempt": 1, "spread": None, "blocks": 1, "floor": 6.5, "floor_n": 1230, "num_images": 2048, "nfe": 35}
    known |= {"sampled_bnr": "0.5", "method": "heun", "metric_name": "FID", "spec": "s1", "measure": "m1"}
    known |= {"seconds": 12.5, "grid": "samples/1.png"}
    begin = datetime(2023, 11, 14, 22, 13, 20, 125000, tzinfo=timezone.utc).timestamp()

    def at(nimg: int, frechet: float | None, **more: Any) -> dict[str, Any]:
        when = datetime.fromtimestamp(begin + nimg, timezone.utc)
        return record | known | {"nimg": nimg, "frechet": frechet, "time": when} | more

    def trial(name: str, state: str, reason: str, rank: int, bnr: Any, log10_bnr: Any) -> dict[str, Any]:
        fixed = {"trial": name, "state": state, "reason": reason, "rank": rank, "seed": 0, "total_nimg": TOTAL}
        return fixed | {"bnr": bnr, "log10_bnr": log10_bnr}

    two = trial("two", "finished", "", 1, 0.01, -2.0) | values("0.01", 1e-3, False, 1.0, 2**53)
    wild = trial("wild", "finished", "", 2, None, None)
    wild |= values('{"kind":"power","bnr":0.5,"exponent":0.2}', 2e-3, True, 0.5, 1)
    none = trial("none", "failed", "NumericsError: not finite\ntraceback", 3, 0.0, None)
    none |= values("0", 1.0, True, None, 0) | record
    assert table.to_pylist() == [
        two | at(50, 9.0, kid=0.5), two | at(TOTAL, 7.25, kid=0.5), wild | at(TOTAL, None, spread=0.5), none,
    ]  # fmt: skip


def test_files_of_no_trial_and_places_that_refuse(tmp_path: Path) -> None:
    """Fault: the file of an empty sweep has no columns, or an OSError comes out in place of OutputError."""
    write_parquet([], tmp_path / "sweep.parquet")
    write_csv([], tmp_path / "table.csv")
    assert pq.read_schema(tmp_path / "sweep.parquet").names == [name for name, _ in [*FIXED, *RECORD]]
    assert (tmp_path / "table.csv").read_text().startswith("trial,state,reason,rank,")
    for write in (write_csv, write_parquet):
        with pytest.raises(OutputError, match="cannot be written"):
            write(ORDER, tmp_path / "table.csv" / "below a file")
