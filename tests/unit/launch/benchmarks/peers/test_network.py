"""The stopwatch that measures everybody on a device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from launch.benchmarks.peers import network
from launch.benchmarks.peers.network import Peer, Subject, covered, flops_per_image, step_of


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(2, 3), (0, 1)], 2), ([(0, 10), (2, 3), (9, 12)], 12), ([(5, 6), (5, 9), (20, 21)], 5)],
)
def test_what_overlaps_is_covered_once(spans: list[tuple[float, float]], length: float) -> None:
    """Fault: kernels of two streams count twice, or a short one inside a long one ends it."""
    assert covered(spans) == length


def test_a_round_is_so_many_calls_after_one_that_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: the calls of the warm-up are in the figures, or seconds are those of the round."""
    calls: list[None] = []
    # a second passes with every call
    monkeypatch.setattr(network, "time", SimpleNamespace(perf_counter=lambda: float(len(calls))))
    subject = Subject(lambda: lambda: calls.append(None), torch.device("cpu"), 4, 3)
    assert subject.facts() == {"first_s": 3, "state": None, "cached": True, "wait_share": None}
    assert subject.round() == {"seconds": 1, "peak": None}
    assert len(calls) == 3 + 1 + 4
    Subject(lambda: lambda: calls.append(None), torch.device("cpu"), 1, 1).round()
    assert len(calls) == 3 + 1 + 4 + 1 + 1  # a round of one call is not warmed up again


def test_memory_of_others_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a contender's peak holds what others hold, or leaves out its own state."""
    memory = SimpleNamespace(held=1000, peak=0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory.held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(memory, "peak", memory.held))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def step() -> None:
        memory.peak = max(memory.peak, memory.held + 50)

    def make() -> Callable[[], None]:
        memory.held += 7
        return step

    subject = Subject(make, torch.device("cuda"), 2, 1)
    memory.held, memory.peak = memory.held + 500, 9999  # somebody else has come, and had a high peak
    assert (subject.state, subject.round()["peak"]) == (7, 57)


def test_the_wait_is_what_no_kernel_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a profiler's range over kernels, or an operation on the host, counts as a kernel; another unit of time."""
    calls: list[None] = []
    monkeypatch.setattr(network, "time", SimpleNamespace(perf_counter=lambda: float(len(calls))))
    subject = Subject(lambda: lambda: calls.append(None), torch.device("cpu"), 2, 1)

    def event(start: float, end: float, device: str = "CUDA", range_: bool = False) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end)
        kind = getattr(network.DeviceType, device)
        return SimpleNamespace(time_range=span, device_type=kind, is_user_annotation=range_)

    # microseconds, of two calls of a second
    events = [event(0, 5e5), event(4e5, 1e6), event(0, 2e6, range_=True), event(0, 2e6, "CPU")]
    monkeypatch.setattr(network, "profile", lambda activities: nullcontext(SimpleNamespace(events=lambda: events)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    subject.cuda = True
    assert subject.wait_share() == pytest.approx(0.5)
    del events[:2]
    assert subject.wait_share() is None


def test_a_peers_step_learns_and_forgets_its_gradient() -> None:
    """Fault: gradients add up over steps, or the optimizer has other weights than the loss."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 3, 3, padding=1)
    peer = Peer(layer, lambda images: layer(images).float().square().mean(), torch.optim.Adam(layer.parameters()))
    before = layer.weight.detach().clone()
    step_of(peer, torch.rand(2, 3, 4, 4))()
    assert layer.weight.grad is None
    assert not torch.equal(layer.weight, before)


def test_operations_are_counted_as_ours_are() -> None:
    """Fault: multiply-adds count once, or the backward pass is left out."""

    class Network(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + times.view(-1, 1, 1, 1)

    image = torch.rand(1, 3, 4, 4)
    assert flops_per_image(Network(3, 5, 1), image) == 3 * 2 * (4 * 4) * 3 * 5
