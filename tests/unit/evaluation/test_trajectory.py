"""The levels that a trajectory shows."""

from __future__ import annotations

import pytest

from warm_dist.evaluation.trajectory import _chosen


@pytest.mark.parametrize("count", range(1, 8))
def test_levels_are_spread_from_the_first_to_the_last(count: int) -> None:
    """Fault: `--columns 2`, which leaves one level beside the image, divides by zero."""
    points = [*range(5)]
    chosen = _chosen(points, count)
    assert len(chosen) == min(count, 5)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert count == 1 or chosen[-1] == 4
