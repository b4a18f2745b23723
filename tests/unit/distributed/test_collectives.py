"""What one rank makes of another's end."""

import pytest
import torch

from warm_dist.distributed.collectives import is_peer_loss
from warm_dist.errors import DataError, UnreachableError


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
