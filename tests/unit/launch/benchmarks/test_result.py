"""Figures of several rounds."""

from __future__ import annotations

from launch.benchmarks.result import Spread


def test_spread_of_rounds() -> None:
    """Fault: the mean or one of the rounds in place of the median, or low and high swapped."""
    assert Spread.of([4.0, 1.0, 2.0, 9.0, 3.0]) == Spread(3.0, 1.0, 9.0)
