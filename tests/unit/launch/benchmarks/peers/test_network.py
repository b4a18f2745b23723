"""The stopwatch that measures everybody on a device."""

from __future__ import annotations

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
