"""Watches all processes with a mark while they run: on which addresses they listen, and whether they tell a secret."""

from __future__ import annotations

import ipaddress
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.processes import marked

EVERY_S = 0.5


def listening(pids: Iterable[int]) -> set[str]:
    """The addresses of all listening TCP sockets of these processes; an IPv4 address is written as such."""
    found = set()
    for pid in pids:
        with suppress(psutil.Error):
            for socket in psutil.Process(pid).net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    address = ipaddress.ip_address(socket.laddr.ip)
                    found.add(str(getattr(address, "ipv4_mapped", None) or address))
    return found


def telling(paths: Iterable[Path], secrets: Iterable[str]) -> set[str]:
    """Those files that hold one of the secrets."""
    words, found = [secret.encode() for secret in secrets], set()
    for path in paths:
        with suppress(OSError):
            if path.is_file() and any(word in path.read_bytes() for word in words):
                found.add(str(path))
    return found


class Watch:
    """`with Watch(mark, secrets) as watch:`; addresses: of listening sockets; told: what tells a secret.

    That is a command line, an open file, or a file in `folder`, even if it does not stay there.
    """

    def __init__(self, mark: str, secrets: Sequence[str] = (), folder: Path | None = None) -> None:
        self.mark, self.secrets, self.folder = mark, secrets, folder
        self.addresses, self.told = set[str](), set[str]()
        self._end = threading.Event()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Watch:
        self._watching = self._thread.submit(self._watch)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.shutdown()
        self._watching.result()  # a watch that has ended early has seen nothing

    def _watch(self) -> None:
        while not self._end.wait(EVERY_S):
            pids = [process.pid for process in marked(self.mark)]
            self.addresses |= listening(pids)
            if self.folder:  # os.walk passes over a folder that is removed meanwhile
                files = (Path(place, name) for place, _, names in os.walk(self.folder) for name in names)
                self.told |= telling(files, self.secrets)
            for pid in pids:
                with suppress(psutil.Error):
                    words = psutil.Process(pid).cmdline()
                    self.told |= {" ".join(words)} if any(one in " ".join(words) for one in self.secrets) else set()
                    self.told |= telling((Path(file.path) for file in psutil.Process(pid).open_files()), self.secrets)
