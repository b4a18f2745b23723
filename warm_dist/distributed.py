"""Processes: who am I, agree on a flag, fail with a message when a peer is gone. Under deepspeed, torchrun or python."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, TCPStore

from warm_dist import owned
from warm_dist.errors import PortError, UnreachableError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, its device, and the gloo group that carries flags beside NCCL's."""

    rank: int
    size: int
    device: torch.device
    control: Any  # a gloo ProcessGroup, or None when size is 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(timeout_s: int) -> World:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe; default: alone.

    Local runs listen on loopback only. Raises PortError if MASTER_PORT is taken, UnreachableError if peers stay away.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    use_device(device)
    for key, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, str(value))
    if os.environ["MASTER_ADDR"] in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return World(0, 1, device, None)
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            dist.init_process_group(backend, timeout=timeout)  # torchrun's agent listens already
        else:
            store = _store(rank, size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        master = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        first = str(error).splitlines()[0]
        raise UnreachableError(f"rank {rank} of {size} could not join its peers at {master}: {first}") from error
    return World(rank, size, device, control)


def _store(rank: int, size: int, timeout: timedelta) -> TCPStore:
    """The rendezvous store, bound to MASTER_ADDR alone (torch's own would listen on every address)."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "29500"))
    if rank:
        return TCPStore(host, port, size, is_master=False, timeout=timeout)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(size)
    except OSError as error:
        raise PortError(
            f"{host}:{port} cannot be bound ({error.strerror}); choose another with --master_port"
        ) from None
    return TCPStore(
        host,
        port,
        size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def use_device(device: torch.device) -> None:
    """Make it this thread's own: a new thread would pin memory by way of GPU 0, on every rank."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def set_threads() -> None:
    """Share the cores among the node's ranks, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))


def shutdown() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def any_rank(world: World, flag: bool) -> bool:
    """True on every rank if it is True on one. A collective."""
    if world.control is None:
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=world.control)
    return bool(votes.item())


def on_main(world: World, action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and hand its (picklable) result, or its exception, to every rank. A collective."""
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    if world.control is not None:
        dist.broadcast_object_list(outcome, src=0, group=world.control)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(world: World, value: Any) -> list[Any]:
    """Every rank's (picklable) value in rank order, on every rank. A collective."""
    if world.control is None:
        return [value]
    out: list[Any] = [None] * world.size
    dist.all_gather_object(out, value, group=world.control)
    return out


def barrier(world: World, what: str) -> None:
    """Wait for all ranks; raises UnreachableError naming the rank and the place when one does not come in time."""
    if world.control is None:
        return
    try:
        dist.barrier(group=world.control)
    except RuntimeError as error:
        raise UnreachableError(f"rank {world.rank} waited in vain at '{what}': {str(error).splitlines()[0]}") from error


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
            try:
                work.wait()
            except RuntimeError as error:
                raise UnreachableError(f"rank {self.world.rank} lost a peer: {str(error).splitlines()[0]}") from error
        return [bool(value) for value in values]


class StopSignal:
    """SIGTERM and SIGINT become a flag: the loop ends after its step, saves, and exits resumably."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> StopSignal:
        """Take over both signals (main thread only). A launcher's second signal changes nothing: a save is under way.

        A rank whose launcher was killed with -9 gets SIGTERM too: it saves and ends instead of training on alone.
        """
        if "LOCAL_RANK" in os.environ:  # a launcher started us, not a shell that may close
            owned.end_with_parent(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
