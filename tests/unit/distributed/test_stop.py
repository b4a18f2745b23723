"""Requests to stop: which signals are one, and what becomes of it while there is nothing to be saved."""

from __future__ import annotations

import contextlib
import signal
import time

import pytest

from tests.support.patience import until
from warm_dist import supervisor
from warm_dist.distributed import stop as module
from warm_dist.distributed.stop import StoppedAtOnce, StopSignal
from warm_dist.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(module, "_UNWIND_S", 30.0)  # the test's process is not one to be ended
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


def test_a_wait_for_a_batch_has_patience(monkeypatch):
    """Fault: a batch that comes a moment after the stop is not trained on, or one that never comes is waited for."""
    monkeypatch.setattr(module, "_POLL_S", 0.02)
    stop = StopSignal().install()
    signal.raise_signal(signal.SIGTERM)
    with stop.at_once("waiting for a batch", 30.0):
        time.sleep(0.1)
    begun = time.monotonic()
    with pytest.raises(StoppedAtOnce, match="while waiting for a batch"), stop.at_once("waiting for a batch", 0.2):
        time.sleep(60)
    assert 0.2 <= time.monotonic() - begun < 5


def test_another_thread_ends_what_the_main_one_cannot(monkeypatch):
    """The kernel tells it of the signal, for Python's handlers run in the main thread, which is inside torch."""
    for name, seconds in (("_POLL_S", 0.02), ("_UNWIND_S", 0.1), ("PATIENCE_S", 0.1)):
        monkeypatch.setattr(module, name, seconds)
    ended: list[str] = []
    stop = StopSignal().install()
    stop.abandon = lambda error: ended.append(error.what)
    monkeypatch.setattr(signal, "pthread_kill", lambda *thread: None)  # as if it were not heard
    supervisor.on_request(lambda *heard: None)
    with stop.at_once("waiting for its peers"):
        signal.raise_signal(signal.SIGUSR1)
        until(lambda: bool(ended))
    assert stop.name == "SIGUSR1"
    assert "SIGUSR1 on host" in ended[0]
    assert "while waiting for its peers" in ended[0]
    stop.hindrance = lambda: "waiting for rank 1"
    ended.clear()
    until(lambda: bool(ended))
    stop.hindrance = lambda: None
    assert ended[0].endswith("while waiting for rank 1")
