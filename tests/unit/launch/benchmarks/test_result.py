"""Figures of several rounds."""

from __future__ import annotations

from launch.benchmarks.result import Spread


def test_spread_of_rounds() -> None:
    """Fault: the first round in place of the median, or low and high swapped."""
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
