"""Work over processes: all of it, whoever does it; errors come home, and a killed worker is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.shards.process_pool import in_processes
from tests.processes import ROOT
from warm_dist.errors import ConfigError, DataError, Stopped

pytestmark = pytest.mark.slow


def square(number: int) -> int:
    return number**2


def fail_at_three(task: tuple[Path, int]) -> int:
    folder, number = task
    if number == 3:
        raise DataError("image 'three' is bad")
    (folder / str(number)).touch()
    return number


def killed_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("count", [1, 3])
def test_every_task_is_done_once(count: int) -> None:
    assert sorted(in_processes(square, range(50), count)) == [number**2 for number in range(50)]
    assert list(in_processes(square, [], count)) == []


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_error_comes_home_and_ends_the_rest(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match="image 'three' is bad"):
        list(in_processes(fail_at_three, ((tmp_path, number) for number in range(1000)), count))
    assert len(list(tmp_path.iterdir())) < 100


def test_a_killed_worker_is_told_and_nobody_waits_for_it() -> None:
    with pytest.raises(Stopped, match="a worker process was killed"):
        list(in_processes(killed_at_three, range(100), 2))


def test_a_worker_that_starts_as_its_owner_dies_does_not_stay() -> None:
    code = "from data_pipelines import workers; workers._begin(1 << 30); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_no_workers() -> None:
    with pytest.raises(ConfigError, match="0 workers: must be at least 1"):
        list(in_processes(square, [1], 0))
