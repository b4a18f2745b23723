"""Processes: who am I, agree on a flag, fail with a message when a peer is gone. Under deepspeed, torchrun or python."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d

from warm_dist import supervisor
from warm_dist.errors import PortError, UnreachableError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
JOIN_S = 180  # nodes start at different speeds: a collective's patience would be too short
NCCL_GRACE = timedelta(seconds=30)
"""NCCL's watchdog aborts the process without a word: gloo, which raises, is to run out of patience first."""
_SIOCGIFADDR = 0x8915  # linux/sockios.h


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


class PeerLost(UnreachableError):
    """A wait for other ranks that broke or ran out of time."""


def init(timeout_s: int, join_s: int = JOIN_S) -> World:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe; default: alone.

    timeout_s: how long a collective may wait. join_s: how long to wait for all to come, at least timeout_s.
    Local runs listen on loopback only, others on the interface that leads to MASTER_ADDR (unless GLOO_SOCKET_IFNAME
    names another). Raises PortError if MASTER_PORT is taken, UnreachableError naming the ranks that stay away.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    use_device(device)
    for key, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, str(value))
    timeout, join_s = timedelta(seconds=timeout_s), max(timeout_s, join_s)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return World(0, 1, device, None)
    interface = interface_to(os.environ["MASTER_ADDR"])
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store: Store | None = None
    try:
        store = _store(rank, size, timedelta(seconds=join_s))
        store.set(beat_key(rank), json.dumps({"host": socket.gethostname()}))
        store.wait([beat_key(peer) for peer in range(size)])
        main_timeout = timeout + NCCL_GRACE if cuda else timeout
        # DeepSpeed reduces gradients over groups of its own, made without a timeout: torch's default is 30 minutes
        vars(distributed_c10d).update(default_pg_timeout=main_timeout, default_pg_nccl_timeout=main_timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=main_timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        why = _who_stayed_away(store, size) or str(error).splitlines()[0]
        raise UnreachableError(
            f"rank {rank} of {size} (host {socket.gethostname()}) could not join its peers at {master()} "
            f"in {join_s} s: {why}; start every node with the same MASTER_ADDR and port"
        ) from error
    return World(rank, size, device, control)


def master() -> str:
    """Address and port of the rendezvous store, which rank 0 (under torchrun: an agent) holds."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '29500')}"


def beat_key(rank: int) -> str:
    """Where in the store a rank tells that it is there, first in `init`, then from its heartbeat."""
    return f"beat/{rank}"


def connect(timeout: timedelta, listener: int | None = None, size: int | None = None) -> Store:
    """A connection of its own to the rendezvous store; with the descriptor of a listening socket, the store itself."""
    run = "/".join(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ.get("MASTER_PORT", "29500")),
        size,
        is_master=listener is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    return PrefixStore(f"warm_dist/{run}", store)  # torchrun's agent keeps one store through all its restarts


def _store(rank: int, size: int, timeout: timedelta) -> Store:
    """The rendezvous store, bound to MASTER_ADDR alone (torch's own would listen on every address)."""
    if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent listens already
        return connect(timeout)
    host, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "29500"))
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
    return connect(timeout, listener.detach(), size)


def _who_stayed_away(store: Store | None, size: int) -> str:
    """Which ranks came to the store and which did not; empty if it cannot tell."""
    if store is None:
        return "rank 0's machine does not answer"
    try:
        came = {r: json.loads(store.get(beat_key(r)))["host"] for r in range(size) if store.check([beat_key(r)])}
    except RuntimeError:
        return ""
    absent = [str(r) for r in range(size) if r not in came]
    here = ", ".join(f"{r} (host {host})" for r, host in came.items())
    noun = "rank" if len(absent) == 1 else "ranks"
    return f"{noun} {', '.join(absent)} did not come, only {here}" if absent else ""


def interface_to(host: str) -> str | None:
    """The network interface by which `host` is reached, as gloo wants it named; None if that cannot be told (IPv6).

    Left to itself gloo takes the address of the machine's own name, often 127.0.1.1, which no peer can reach.
    """
    if host in LOOPBACK:
        return "lo"
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # a datagram socket sends nothing here; the kernel only looks up the route
        ours = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if answer[20:24] == ours:
                    return name
    return None


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


class StopSignal:
    """SIGTERM and SIGINT become a flag: the loop ends after its step, saves, and exits resumably."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> StopSignal:
        """Take over both signals (main thread only). A launcher's second signal changes nothing: a save is under way.

        A rank whose launcher was killed with -9 gets SIGTERM too: it saves and ends instead of training on alone.
        """
        if "LOCAL_RANK" in os.environ:  # a launcher started us, not a shell that may close
            supervisor.end_with_parent(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.name = self.name or signal.Signals(number).name  # the first: a launcher answers Ctrl-C with SIGTERM

    def reason(self, world: World) -> str:
        """What stopped the run, and where: `SIGTERM on rank 1 (host node2)`. A collective."""
        mine = f"{self.name} on rank {world.rank} (host {socket.gethostname()})" if self.name else None
        told: list[str | None] = []
        with suppress(PeerLost):
            told = gather(world, mine, "stop")
        return next((name for name in told if name), mine or "a stop on another rank")
