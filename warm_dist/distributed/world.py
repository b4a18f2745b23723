"""Joining the process group: this process's rank, device and groups, under deepspeed, torchrun or python."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d

from warm_dist.cpus import usable_cpus
from warm_dist.distributed.environment import from_environment
from warm_dist.errors import ConfigError, PortError, UnreachableError, leave_the_word, print_line

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ELSEWHERE = "127.0.0.2"  # on Linux the machine's own too; nobody listens on it alone
_SLICE_S = 2.0  # of a wait inside torch, where no signal is handled
JOIN_S = 180  # nodes start at different speeds: the timeout of a collective would be too short
NCCL_GRACE = timedelta(seconds=30)  # gloo must time out first: it raises, NCCL's watchdog aborts the process
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SIOCGIFADDR = 0x8915  # linux/sockios.h

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, its device, and a gloo group for flags and objects."""

    rank: int
    size: int
    device: torch.device
    control: Any  # a gloo ProcessGroup, or None when size is 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join(timeout_s: int, join_s: int = JOIN_S) -> World:
    """Join the process group of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them, one rank.

    timeout_s: of a collective. join_s: how long to wait for all ranks to join, at least timeout_s.
    Local runs listen on loopback only, others on the interface to MASTER_ADDR, unless GLOO_SOCKET_IFNAME is set (and
    NCCL where it likes, unless NCCL_SOCKET_IFNAME is set).
    Raises PortError if MASTER_PORT is in use, UnreachableError that names the ranks that did not join.
    """
    rank, size, local_rank = (
        from_environment("RANK", 0),
        from_environment("WORLD_SIZE", 1),
        from_environment("LOCAL_RANK", 0),
    )
    if not 0 <= rank < size:
        raise ConfigError(f"RANK {rank} is not below WORLD_SIZE {size}; the launcher sets both")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    use_device(device)
    for key, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, str(value))
    timeout, join_s = timedelta(seconds=timeout_s), max(timeout_s, join_s)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    interface = interface_to(os.environ["MASTER_ADDR"] if size > 1 else LOOPBACK[0])
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if interface == "lo":  # which NCCL would take last
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    if rank == 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        _tell_open_store()
    if size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return World(0, 1, device, None)
    store: Store | None = None
    try:
        store = _store(rank, size, timedelta(seconds=join_s))
        store.set(beat_key(rank), json.dumps({"host": socket.gethostname()}))
        peers = store
        _in_slices(lambda left: peers.wait([beat_key(peer) for peer in range(size)], left), timedelta(seconds=join_s))
        main_timeout = timeout + NCCL_GRACE if cuda else timeout
        # DeepSpeed's own groups have no timeout argument: set torch's default, which is 30 minutes
        vars(distributed_c10d).update(default_pg_timeout=main_timeout, default_pg_nccl_timeout=main_timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=main_timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        why = _who_stayed_away(store, size) or str(error).splitlines()[0]
        raise UnreachableError(
            f"rank {rank} of {size} (host {socket.gethostname()}) could not join its peers at {master_address()} "
            f"in {join_s} s: {why}; start every node with the same MASTER_ADDR and port"
        ) from error
    leave_the_word(rank > 0)
    return World(rank, size, device, control)


def master_address() -> str:
    """`host:port` of the rendezvous store, which rank 0 (under torchrun: an agent) serves."""
    return "{}:{}".format(*_address())


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], from_environment("MASTER_PORT", 29500)


def beat_key(rank: int) -> str:
    """Key of a rank's heartbeat in the store; `join` writes the first one."""
    return f"beat/{rank}"


def connect(timeout: timedelta, listener: int | None = None, size: int | None = None) -> Store:
    """Connect to the rendezvous store, or serve it on the file descriptor `listener` of a listening socket."""
    run = "/".join(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    store = TCPStore(
        *_address(), size, listener is not None, timeout=timeout, wait_for_workers=False, master_listen_fd=listener
    )
    return PrefixStore(f"warm_dist/{run}", store)  # torchrun's agent keeps one store over its restarts


def _store(rank: int, size: int, timeout: timedelta) -> Store:
    """Open the rendezvous store; rank 0 binds it to MASTER_ADDR only (torch itself would listen on every address)."""
    if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent serves it
        store = _in_slices(connect, timeout)
        store.set_timeout(timeout)
        return store
    host, port = _address()
    try:
        listener = listen(host, port)
    except OSError as error:
        raise PortError(f"{host}:{port} cannot be bound ({error.strerror}); set another --master_port") from None
    return connect(timeout, listener.detach(), size)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address of `host` only. port 0: a free one. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _tell_open_store() -> None:
    """Say so where torchrun's store, which holds what ranks tell each other, listens on every address."""
    port = _address()[1]
    with suppress(OSError), socket.create_connection((_ELSEWHERE, port), timeout=1):
        print_line(
            f"torchrun listens on every address of this machine, without a password: close port {port} and that of "
            "--rdzv-endpoint to others, or start by `python -m warm_dist.distributed.torchrun` instead of `torchrun`"
        )


def _in_slices(wait: Callable[[timedelta], T], timeout: timedelta) -> T:
    """`wait(timeout)` in parts, between which signals are handled. Raises what it raises at the end of the last part."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        left = deadline - time.monotonic()
        try:
            return wait(timedelta(seconds=max(0.01, min(left, _SLICE_S))))
        except (dist.DistError, RuntimeError, TimeoutError):
            if left <= _SLICE_S:
                raise
        time.sleep(0.1)  # after an error at once


def _who_stayed_away(store: Store | None, size: int) -> str:
    """Which ranks joined and which did not, as text; empty if that is unknown."""
    if store is None:
        return "rank 0's machine does not answer"
    try:
        came = {r: json.loads(store.get(beat_key(r)))["host"] for r in range(size) if store.check([beat_key(r)])}
    except (RuntimeError, ValueError, LookupError, TypeError):  # the store is lost, or somebody else wrote to it
        return ""
    absent = [str(r) for r in range(size) if r not in came]
    here = ", ".join(f"{r} (host {host})" for r, host in came.items())
    noun = "rank" if len(absent) == 1 else "ranks"
    return f"{noun} {', '.join(absent)} did not come, only {here}" if absent else ""


def interface_to(host: str) -> str | None:
    """The name of the network interface on the route to `host`; None if unknown (IPv6).

    By default gloo uses the address of the machine's own name, often 127.0.1.1, which no peer can reach.
    """
    if host in LOOPBACK:
        return "lo"
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing, the kernel only looks up the route
        ours = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # no IPv4 address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if answer[20:24] == ours:
                    return name
    return None


def use_device(device: torch.device) -> None:
    """Select this thread's GPU: a new thread would otherwise pin memory through GPU 0, on every rank."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def prepare_host() -> None:
    """Divide the CPUs that are ours among the node's ranks, unless OMP_NUM_THREADS is set, and `keep_freed_memory` without a GPU."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = from_environment("LOCAL_WORLD_SIZE", from_environment("LOCAL_SIZE", 1))
        torch.set_num_threads(max(1, usable_cpus() // max(1, local)))
    if not torch.cuda.is_available():
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next tensors; other C libraries are left alone.

    Otherwise it returns large blocks to the kernel, and a step on a CPU spends up to a tenth of its time on page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
            mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that older versions accept


def shutdown() -> None:
    """Leave the process group, if joined."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
