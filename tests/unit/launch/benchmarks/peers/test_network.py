"""The stopwatch that measures everybody on a device."""

from __future__ import annotations

import pytest
import torch

from launch.benchmarks.peers.network import Peer, Subject, covered, flops_per_image, step_of


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(2, 3), (0, 1)], 2), ([(0, 10), (2, 3), (9, 12)], 12), ([(5, 6), (5, 9), (20, 21)], 5)],
)
def test_what_overlaps_is_covered_once(spans: list[tuple[float, float]], length: float) -> None:
    """Fault: kernels of two streams count twice, or a short one inside a long one ends it."""
    assert covered(spans) == length


def test_a_round_is_so_many_calls_after_one_that_is_not_timed() -> None:
    """Fault: the calls of the warm-up are in the figures, or seconds are those of the round."""
    calls, clock = [], iter(range(1000))
    subject = Subject(lambda: lambda: calls.append(next(clock)), torch.device("cpu"), 4, 3)
    assert len(calls) == 3
    found = subject.round()
    assert len(calls) == 3 + 1 + 4
    assert 0 < found["seconds"] < 0.1
    assert found["peak"] is None
    assert subject.facts() | {"first_s": 0} == {"first_s": 0, "state": None, "cached": True, "wait_share": None}
    alone = Subject(lambda: lambda: calls.append(0), torch.device("cpu"), 1, 1)
    alone.round()
    assert calls.count(0) == 3  # the first of all; one to warm up; a round of one is not warmed up again


def test_a_peers_step_learns_and_forgets_its_gradient() -> None:
    """Fault: gradients add up over steps, or the optimizer has other weights than the loss."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    peer = Peer(network, lambda images: network(images).float().square().mean(), torch.optim.Adam(network.parameters()))
    before = network.weight.detach().clone()
    step_of(peer, torch.rand(2, 3, 4, 4))()
    assert network.weight.grad is None
    assert not torch.equal(network.weight, before)


def test_operations_are_counted_as_ours_are() -> None:
    """Fault: multiply-adds count once, or the backward pass is left out."""

    class Network(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + times.view(-1, 1, 1, 1)

    image = torch.rand(1, 3, 4, 4)
    assert flops_per_image(Network(3, 5, 1), image) == 3 * 2 * (4 * 4) * 3 * 5
