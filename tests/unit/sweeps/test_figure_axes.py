"""Where things stand on the axes of a sweep's pictures."""

from __future__ import annotations

import math

import pytest

from tests.support.outcomes import POWER, TOTAL, outcome
from warm_dist.sweeps.figure_axes import Coordinate, coordinate, fanned, log_places, ticks
from warm_dist.sweeps.figures import curves_figure


def test_zero_has_a_place_left_of_the_smallest_bnr() -> None:
    assert log_places([10.0, 0.1, 1.0, 0.1]) == {0.1: -1.0, 1.0: 0.0, 10.0: 1.0}
    assert log_places([0.0, 1.0, 2.0])[0.0] == pytest.approx(-1 / 3), "a third of a decade at least"
    assert log_places([0.0, 1e-3, 1e4])[0.0] == pytest.approx(-4.0), "a seventh of seven decades"
    assert log_places([0]) == {0.0: pytest.approx(-1 / 3)}


def test_few_values_have_their_own_ticks_and_many_have_round_ones() -> None:
    assert ticks(log_places([0, 0.05, 0.123]), log=True, gap=0.1) == [
        (pytest.approx(math.log10(0.05) - math.log10(0.123 / 0.05) / 7, abs=0.3), "0"),
        (math.log10(0.05), "0.05"), (math.log10(0.123), "0.123"),
    ]  # fmt: skip
    many = log_places([0.0, *(0.01 * 1.2**k for k in range(40))])  # to 12.2
    assert [label for _, label in ticks(many, log=True, gap=0.1)][:5] == ["0", "0.01", "0.02", "0.05", "0.1"]
    narrow = log_places([0.301 + 0.001 * k for k in range(12)])
    assert len(ticks(narrow, log=True, gap=0.0)) > 1, "no 1, 2 or 5 lies there"
    crowd = [place for place, _ in ticks({float(k): float(k) for k in range(9)}, log=False, gap=2.0)]
    assert crowd == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_a_narrow_log_axis_has_ticks() -> None:
    figure = curves_figure([outcome("a", (50, 41.0), (TOTAL, 29.5))])
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert sum(low <= tick <= high for tick in figure.axes[0].get_yticks()) >= 4


def test_coordinates() -> None:
    assert coordinate("a", [1, 3, 2.0]) == Coordinate("a", [0.0, 1.0, 0.5], [(0.0, "1"), (0.5, "2"), (1.0, "3")])
    wide = coordinate("lr", [1e-4, 1e-2, 1e-3])
    assert wide.places == pytest.approx([0.0, 1.0, 0.5])
    assert coordinate("a", [1.0, 20.0, 10.5]).places[2] == 0.5, "not wide enough for a log axis"
    zero = coordinate("bnr", [0.0, 0.5, 4.0], log=True)
    assert zero.places == pytest.approx([0, (1 / 3) / (1 / 3 + math.log10(8)), 1])
    assert [label for _, label in zero.ticks] == ["0", "0.5", "4"]
    mixed = coordinate("bnr", ["b", POWER, 10, True, 2, None])
    assert [label for _, label in mixed.ticks] == ["2", "10", "b", "null", "power(bnr 0.5,\nexponent 0.2)", "true"]
    assert mixed.places == pytest.approx([0.4, 0.8, 0.2, 1.0, 0.0, 0.6])
    assert coordinate("a", [7, 7]) == Coordinate("a", [0.5, 0.5], [(0.5, "7")])
    assert coordinate("a", ["x"]) == Coordinate("a", [0.5], [(0.5, "x")])
    assert [label for _, label in coordinate("a", [0, 0.01, 1]).ticks] == ["0", "1"], "0.01 has no room"
    assert len(coordinate("a", [f"v{k:02}" for k in range(60)]).ticks) <= 23, "labels need 0.045 each"


def test_trials_at_one_place_are_fanned() -> None:
    found = fanned(Coordinate("a", [0.5, 1.0, 0.5, 0.5, 0.0], []))
    assert found == pytest.approx([0.515, 1.0, 0.5, 0.485, 0.0])
