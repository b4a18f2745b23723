"""Work for one worker is done in this process; several are in tests/integration."""

from __future__ import annotations

import pytest

from data_pipelines.shards.process_pool import in_processes
from warm_dist.errors import ConfigError, DataError


def square(number: int) -> int:
    if number == 50:
        raise DataError("image 'fifty' is bad")
    return number**2


def test_one_worker_does_every_task_in_order_and_stops_at_an_error() -> None:
    with pytest.raises(DataError, match="image 'fifty' is bad"):
        list(in_processes(square, range(100), 1))
    assert list(in_processes(square, range(50), 1)) == [number**2 for number in range(50)]
    assert list(in_processes(square, [], 1)) == []


def test_no_workers() -> None:
    """Fault: --workers 0 ends in the pool's ValueError, or does nothing and reports success."""
    with pytest.raises(ConfigError, match="0 workers: must be at least 1"):
        list(in_processes(square, [1], 0))
