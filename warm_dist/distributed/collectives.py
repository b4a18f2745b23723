"""Collectives that fail with a clear message when a rank is lost. All raise PeerLost in that case."""

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
    """A collective that failed or timed out."""


@contextmanager
def _waiting(world: World, what: str) -> Iterator[None]:
    """Turn torch's error into a PeerLost that says which rank waited, in which collective and how long."""
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        failed = f"rank {world.rank} failed in '{what}' after {time.monotonic() - began:.0f} s"
        raise PeerLost(f"{failed}: {str(error).splitlines()[0]}") from error


def any_rank(world: World, flag: bool, what: str = "vote") -> bool:
    """Whether `flag` is true on any rank."""
    if world.control is None:
        return flag
    votes = torch.tensor([int(flag)])
    with _waiting(world, what):
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=world.control)
    return bool(votes.item())


def on_main(world: World, action: Callable[[], Any], what: str = "rank 0's result") -> Any:
    """Run `action` on rank 0 and return its (picklable) result on every rank.

    Raises on every rank what `action` raises.
    """
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
    """All ranks' (picklable) values in rank order, on every rank."""
    if world.control is None:
        return [value]
    out: list[Any] = [None] * world.size
    with _waiting(world, what):
        dist.all_gather_object(out, value, group=world.control)
    return out


def collect(world: World, value: Any, what: str = "collect") -> list[Any]:
    """All ranks' (picklable) values in rank order on rank 0, an empty list on the others."""
    if world.control is None:
        return [value]
    out: list[Any] | None = [None] * world.size if world.is_main else None
    with _waiting(world, what):
        dist.gather_object(value, out, dst=0, group=world.control)
    return out or []


def add_up(world: World, values: NDArray[np.float64], what: str = "sum") -> NDArray[np.float64]:
    """The sum over ranks in float64, on every rank."""
    if world.control is None:
        return values
    total = torch.from_numpy(np.array(values))
    with _waiting(world, what):
        dist.all_reduce(total, group=world.control)
    return total.numpy()


def barrier(world: World, what: str) -> None:
    """Wait for all ranks."""
    if world.control is not None:
        with _waiting(world, what):
            dist.barrier(group=world.control)


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error comes from a lost peer and not from this rank's code.

    torch raises plain RuntimeErrors for gloo, which only their text tells from others.
    """
    if isinstance(error, UnreachableError | dist.DistError):
        return True
    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


class Flags:
    """Booleans shared with all ranks without stopping the step: posted in one step, read in the next.

    `post` starts an all-reduce (MAX) on the gloo group; `read` waits for it.
    """

    def __init__(self, world: World, count: int) -> None:
        self.world, self.count = world, count
        self._pending: tuple[Tensor, Any] | None = None

    def post(self, *flags: bool) -> None:
        """Send `count` flags. Call `read` before the next `post`."""
        work, values = None, torch.tensor(flags, dtype=torch.int32)
        if self.world.control is not None:
            work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        self._pending = (values, work)

    def read(self) -> list[bool]:
        """The flags of the last `post`, each true if any rank set it; all false if none were posted since."""
        if self._pending is None:
            return [False] * self.count
        values, work = self._pending
        self._pending = None
        if work is not None:
            with _waiting(self.world, "flags"):
                work.wait()
        return [bool(value) for value in values]
