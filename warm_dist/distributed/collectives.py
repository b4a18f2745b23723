"""Collectives that fail with a clear message when a rank is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from warm_dist.distributed.world import World
from warm_dist.errors import UnreachableError


class PeerLost(UnreachableError):
    """A wait for other ranks that broke or ran out of time."""


@contextmanager
def _waiting(world: World, what: str) -> Iterator[None]:
    """Turn the end of a peer, or its silence, into a PeerLost that says who waited, where and how long."""
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        waited = f"rank {world.rank} waited in vain at '{what}' for {time.monotonic() - began:.0f} s"
        raise PeerLost(f"{waited}: {str(error).splitlines()[0]}") from error


def any_rank(world: World, flag: bool, what: str = "vote") -> bool:
    """True on every rank if it is True on one. A collective; raises PeerLost, and so do all below."""
    if world.control is None:
        return flag
    votes = torch.tensor([int(flag)])
    with _waiting(world, what):
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=world.control)
    return bool(votes.item())


def on_main(world: World, action: Callable[[], Any], what: str = "rank 0's word") -> Any:
    """Run `action` on rank 0 and hand its (picklable) result, or its exception, to every rank. A collective."""
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    if world.control is not None:
        with _waiting(world, what):
            dist.broadcast_object_list(outcome, src=0, group=world.control)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(world: World, value: Any, what: str = "gather") -> list[Any]:
    """Every rank's (picklable) value in rank order, on every rank. A collective."""
    if world.control is None:
        return [value]
    out: list[Any] = [None] * world.size
    with _waiting(world, what):
        dist.all_gather_object(out, value, group=world.control)
    return out


def collect(world: World, value: Any, what: str = "collect") -> list[Any]:
    """Every rank's (picklable) value in rank order on rank 0, nothing on the others. A collective."""
    if world.control is None:
        return [value]
    out: list[Any] | None = [None] * world.size if world.is_main else None
    with _waiting(world, what):
        dist.gather_object(value, out, dst=0, group=world.control)
    return out or []


def add_up(world: World, values: NDArray[np.float64], what: str = "sum") -> NDArray[np.float64]:
    """The sum over ranks, in float64, on every rank. A collective."""
    if world.control is None:
        return values
    total = torch.from_numpy(np.array(values))
    with _waiting(world, what):
        dist.all_reduce(total, group=world.control)
    return total.numpy()


def barrier(world: World, what: str) -> None:
    """Wait for all ranks. A collective."""
    if world.control is not None:
        with _waiting(world, what):
            dist.barrier(group=world.control)


def is_peer_loss(error: BaseException) -> bool:
    """Whether a collective broke because another rank is gone, and not this rank's own code.

    torch raises plain RuntimeErrors for gloo; only their words tell them from any other.
    """
    if isinstance(error, UnreachableError | dist.DistError):
        return True
    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


class Flags:
    """Facts that one rank knows and all must adopt, sent without stopping the step and read one step later.

    `post` starts an all-reduce (MAX) of a few booleans on the gloo group; `read` waits for it.
    """

    def __init__(self, world: World, count: int) -> None:
        self.world, self.count = world, count
        self._pending: tuple[Tensor, Any] | None = None

    def post(self, *flags: bool) -> None:
        """`count` flags. Follows a `read`."""
        work, values = None, torch.tensor(flags, dtype=torch.int32)
        if self.world.control is not None:
            work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        self._pending = (values, work)

    def read(self) -> list[bool]:
        """The last posted flags after the reduction; all False if none was posted since."""
        if self._pending is None:
            return [False] * self.count
        values, work = self._pending
        self._pending = None
        if work is not None:
            with _waiting(self.world, "flags"):
                work.wait()
        return [bool(value) for value in values]
