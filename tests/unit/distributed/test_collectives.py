"""What one rank makes of another's flags, and of its end."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from warm_dist.distributed.collectives import Flags, any_rank, is_peer_loss
from warm_dist.distributed.world import World
from warm_dist.errors import DataError, UnreachableError


@pytest.mark.parametrize("mine", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_what_any_rank_says_holds_for_all(monkeypatch, mine, theirs):
    """Fault: a stop, or a non-finite step, counts only if every rank has it."""
    together = {dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.MIN: torch.minimum}

    def all_reduce(values: torch.Tensor, op: Any, group: Any, async_op: bool = False) -> Any:
        values.copy_(together[op](values, torch.full_like(values, int(theirs))))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    world = World(0, 2, torch.device("cpu"), object())
    assert any_rank(world, mine) == (mine or theirs)
    flags = Flags(world, 2)
    flags.post(mine, False)
    assert flags.read() == [mine or theirs, theirs]
    assert flags.read() == [False, False]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        DataError("image x"),
        ValueError("gloo"),
    ],
)
def test_a_fault_of_our_own_is_not_blamed_on_a_peer(error):
    assert not is_peer_loss(error)


@pytest.mark.parametrize(
    "error",
    [
        # as torch 2.14 words it when a rank of two is killed
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"
        ),
        torch.distributed.DistBackendError("NCCL error"),
        UnreachableError("rank 0 failed in 'copy' after 10 s"),
    ],
)
def test_a_broken_collective_is_a_peers_end(error):
    assert is_peer_loss(error)
