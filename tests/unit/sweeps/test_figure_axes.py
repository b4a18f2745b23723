"""Where things stand on the axes of a sweep's pictures."""

from __future__ import annotations

import math

import pytest

from tests.support.outcomes import TOTAL, outcome
from warm_dist.sweeps.figure_axes import log_places, ticks
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
