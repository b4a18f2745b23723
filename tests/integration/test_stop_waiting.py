"""A stop while a rank waits for a peer that never comes, inside torch, where Python handles no signal."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.packed import Packed
from tests.support.processes import free_port, wait_for
from tests.support.training import digits_config, finish, start

HEEDED_S = 5.0


def handles(pid: int, number: int) -> bool:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_it_is_heeded_at_once(tmp_path: Path, digits: Packed, rank: int, number: signal.Signals) -> None:
    """Fault: nothing for the 180 s that peers may take, and then "could not join" with 11."""
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
    process = start([sys.executable], digits_config(tmp_path, digits), tmp_path / "run", "engine=local", env=env)
    wait_for("its handlers", lambda: handles(process.pid, signal.SIGUSR1))  # set before it joins
    time.sleep(1)
    begun = time.monotonic()
    process.send_signal(number)
    code, _, err = finish(process)
    assert (code, time.monotonic() - begun < HEEDED_S) == (75, True), err
    assert f"{number.name} on host " in err
    assert "while waiting for its peers; run the same command again" in err
