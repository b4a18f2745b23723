"""Requests to stop: which signals are one, and what becomes of it while there is nothing to be saved."""

from __future__ import annotations

import contextlib
import signal
import time

import pytest

from warm_dist import supervisor
from warm_dist.distributed.stop import StoppedAtOnce, StopSignal
from warm_dist.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_is_noted_and_the_first_one_told(number):
    """Fault: the closed terminal, SLURM's --signal=USR1 or a limit of CPU time ends a run without a save."""
    stop = StopSignal().install()
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)
    assert stop.name == signal.Signals(number).name


def test_nohup_stays_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal().install()
    signal.raise_signal(signal.SIGHUP)
    assert stop.name is None
    signal.raise_signal(signal.SIGUSR1)
    assert stop.name == "SIGUSR1"


def test_a_wait_without_anything_to_save_ends_at_once():
    """Fault: a stop while a peer or server is waited for is heeded minutes later. Libraries catch every Exception."""
    stop = StopSignal().install()
    begun = time.monotonic()
    text = r"SIGTERM on host \S+ while waiting; run the same command again"

    def wait() -> None:
        with stop.at_once("waiting"), contextlib.suppress(Exception):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(StoppedAtOnce, match=text) as caught:
        wait()
    assert time.monotonic() - begun < 5
    assert (caught.value.exit_code, caught.value.resumable, isinstance(caught.value, Stopped)) == (75, True, True)
    signal.raise_signal(signal.SIGTERM)  # afterwards it is only noted
    with pytest.raises(StoppedAtOnce), stop.at_once("waiting again"):
        pytest.fail("a stop before it counts too")


def test_without_a_stop_nothing_happens():
    stop = StopSignal().install()
    with stop.at_once("working"):
        pass
    signal.raise_signal(signal.SIGTERM)
    assert stop.name == "SIGTERM"


def test_a_supervisor_passes_on_all_of_them():
    assert set(SIGNALS) <= supervisor._SIGNALS
