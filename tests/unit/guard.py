"""Starting a process or opening a socket is an error while a file of the unit tier is read or a test of it runs.

In any thread. Not seen: what other C++ libraries (gRPC, Arrow's S3) open by themselves.
"""

from __future__ import annotations

import multiprocessing.util
import platform
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.font_manager  # noqa: F401  # runs fc-list at its import, where no cache of fonts is
import pytest
import torch.distributed
import urllib3  # noqa: F401  # binds a socket at its import, to see whether there is IPv6

STARTS = {"subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.spawn"}
CONNECTS = {"socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
INTERNET = {socket.AF_INET, socket.AF_INET6}
SYMBOLS = {"system", "popen", "fork", "vfork", "posix_spawn", "posix_spawnp", "execv", "execve",
           "syscall", "socket"}  # fmt: skip  # of C
# what tells Python's auditing nothing: processes of multiprocessing's spawn, and sockets of torch's C++
SILENT: tuple[tuple[Any, str], ...] = (
    (multiprocessing.util, "spawnv_passfds"),
    (torch.distributed.TCPStore, "__init__"),
    (torch.distributed.ProcessGroupGloo, "__init__"),
    (torch.distributed, "init_process_group"),
    (torch.distributed.distributed_c10d, "init_process_group"),
)
platform.processor()  # runs uname once; MLflow asks when it is imported


class Forbidden(BaseException):
    """Not an Exception: what is tested must not be able to handle it."""


class Guard:
    """`with guard.watching():` around all that belongs to a unit test, its fixtures included."""

    def __init__(self) -> None:
        self.on = False
        self._caught: list[str] = []
        sys.addaudithook(self._audit)  # for good: only `on` can be undone

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the import of a file of tests: without the patches of `watching`, which would stay in what it imports."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raises Forbidden at its end too, if something was refused and then swallowed, or in another thread."""
        try:
            with self.reading(), pytest.MonkeyPatch.context() as patch:
                for owner, name in SILENT:
                    patch.setattr(owner, name, self._refusal(f"{owner.__name__}.{name}"))
                yield
        finally:
            caught = self.taken()
        if caught:
            raise Forbidden(caught[0])

    def taken(self) -> list[str]:
        """What was refused, which is forgotten with it."""
        out, self._caught = self._caught, []
        return out

    def _refuse(self, what: str) -> None:
        text = f"{what}: the unit tier starts no process: move this test to tests/integration"
        self._caught.append(text)
        raise Forbidden(text)

    def _refusal(self, what: str) -> Callable[..., None]:
        return lambda *arguments, **options: self._refuse(what)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if (
            event in STARTS
            or event in CONNECTS
            or (event == "socket.__new__" and arguments[1] in INTERNET)
            or (event == "ctypes.dlsym" and arguments[1] in SYMBOLS)
        ):
            self._refuse(event)
