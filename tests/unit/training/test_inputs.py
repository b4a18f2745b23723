"""Prefetching: the same results in the same order, errors when they are due, and on CUDA the right waits in the right streams."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

from warm_dist.errors import DataError
from warm_dist.training import inputs
from warm_dist.training.inputs import Prefetch

CPU = torch.device("cpu")


def test_results_come_in_order_and_no_more_is_made_than_was_started():
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    with Prefetch(make, CPU) as ahead:
        ahead.start()
        ahead.start()
        assert len(ahead) == 2
        for expected in range(10):
            assert ahead.take() == expected
            ahead.start()
    assert made[:11] == list(range(11))  # the last one started may have been left undone
    assert len(made) <= 12


def test_an_error_is_raised_when_it_is_due_and_work_goes_on_meanwhile():
    numbers = iter([1, 2, DataError("image 3"), 4])

    def make() -> int:
        value = next(numbers)
        if isinstance(value, Exception):
            raise value
        return value

    with Prefetch(make, CPU) as ahead:
        for _ in range(4):
            ahead.start()
        assert [ahead.take(), ahead.take()] == [1, 2]
        with pytest.raises(DataError, match="image 3"):
            ahead.take()
        assert ahead.take() == 4


def test_it_is_made_while_the_caller_computes_and_leaving_ends_the_thread():
    caller, entered = threading.get_ident(), threading.Event()

    def make() -> int:
        entered.set()
        return threading.get_ident()

    def fail(ahead: Prefetch[int]) -> None:
        with ahead:
            ahead.start()
            assert entered.wait(30)  # without a take
            assert ahead.take() != caller
            ahead.start()
            raise KeyError

    before = set(threading.enumerate())
    with pytest.raises(KeyError):
        fail(Prefetch(make, CPU))
    assert set(threading.enumerate()) <= before


class Nested(NamedTuple):
    x: torch.Tensor
    pair: tuple[torch.Tensor, None]
    name: str


class OnDevice(torch.Tensor):
    """A tensor of the host that says it is on CUDA and notes for whom its memory is held."""

    @property
    def is_cuda(self):
        return True

    def record_stream(self, stream):
        LOG.append(("held for", stream, float(self)))


LOG: list[tuple] = []


class Stream:
    def __init__(self, name):
        self.name = name

    def __eq__(self, other):
        return getattr(other, "name", None) == self.name

    __hash__ = None

    def record_event(self):
        LOG.append(("recorded", self))
        return "event"

    def wait_event(self, event):
        LOG.append(("waits", self, event))


def test_on_cuda_the_copies_have_a_stream_and_the_step_waits_for_them(monkeypatch):
    """By stand-ins for streams and events: what test_gpu.py shows on a device, for machines without one."""
    LOG.clear()
    active = threading.local()

    @contextmanager
    def stream(which):
        active.stream = which
        yield
        active.stream = Stream("main")

    monkeypatch.setattr(inputs, "use_device", lambda device: LOG.append(("device", device)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: getattr(active, "stream", Stream("main")))

    def make() -> Nested:
        LOG.append(("made in", torch.cuda.current_stream()))
        one, two = (torch.tensor(value).as_subclass(OnDevice) for value in (1.0, 2.0))
        return Nested(one, (two, None), "keys")

    device = torch.device("cuda", 1)
    side, main = Stream("side"), Stream("main")
    with Prefetch(make, device) as ahead:
        ahead.start()
        assert ahead.take().name == "keys"
    expected = [
        ("device", device),
        ("made in", side),
        ("recorded", side),
        ("waits", main, "event"),
        ("held for", main, 1.0),
        ("held for", main, 2.0),
    ]
    assert expected == LOG
