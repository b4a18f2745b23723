"""Work over processes: all of it, whoever does it; errors come home, and a killed worker is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.shards.process_pool import in_processes
from tests.support.processes import ROOT
from warm_dist.errors import DataError, Stopped


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


def test_every_task_is_done_once() -> None:
    assert sorted(in_processes(square, range(50), 3)) == [number**2 for number in range(50)]
    assert list(in_processes(square, [], 3)) == []


def test_the_first_error_comes_home_and_ends_the_rest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image 'three' is bad"):
        list(in_processes(fail_at_three, ((tmp_path, number) for number in range(1000)), 2))
    assert len(list(tmp_path.iterdir())) < 100


def test_a_killed_worker_is_told_and_nobody_waits_for_it() -> None:
    with pytest.raises(Stopped, match="a worker process was killed"):
        list(in_processes(killed_at_three, range(100), 2))


def test_a_worker_that_starts_as_its_owner_dies_does_not_stay() -> None:
    code = "from data_pipelines.shards import process_pool; process_pool._begin(1 << 30); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def hears_ctrl_c(_: int) -> bool:
    return signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_is_the_owner_s_to_handle() -> None:
    """Fault: a worker that is still importing prints a traceback at Ctrl-C. A mask is inherited, and nothing else sets it."""
    assert set(in_processes(hears_ctrl_c, range(8), 2)) == {False}
    assert hears_ctrl_c(0)
