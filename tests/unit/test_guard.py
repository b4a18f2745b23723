"""The guard itself: every way to start a process or to open a socket is refused, wherever it happens."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch.distributed
import torch.multiprocessing

from tests.unit.conftest import GUARD
from tests.unit.guard import Forbidden

COMMAND = [sys.executable, "-c", "pass"]
WAYS: dict[str, Callable[[], object]] = {
    "subprocess.run": lambda: subprocess.run(COMMAND, check=False),
    "os.system": lambda: os.system("true"),
    "os.fork": lambda: os.fork() or os._exit(0),
    "os.posix_spawn": lambda: os.posix_spawn(sys.executable, COMMAND, {}),
    "a forked process": lambda: multiprocessing.get_context("fork").Process(target=print).start(),
    "a spawned process": lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
    "a process of torch's": lambda: torch.multiprocessing.spawn(print),
    "a pool": lambda: ProcessPoolExecutor(1, multiprocessing.get_context("spawn")).submit(print),
    "an IPv4 socket": lambda: socket.socket(socket.AF_INET).close(),
    "an IPv6 socket": lambda: socket.create_server(("::1", 0), family=socket.AF_INET6),
    "a name's address": lambda: socket.getaddrinfo("localhost", 80),
    "a store of ranks": lambda: torch.distributed.TCPStore("127.0.0.1", 0, is_master=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_refused(way: str) -> None:
    """Fault: the guard misses one of the ways in which a test can start a process or open a socket."""
    with pytest.raises(Forbidden, match="the unit tier starts no process: move this test to tests/integration"):
        WAYS[way]()
    assert len(GUARD.taken()) == 1


def test_in_a_thread_it_is_refused_and_remembered() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(Forbidden):
        pool.submit(subprocess.run, COMMAND).result()
    swallowed = threading.Thread(target=lambda: _swallow(WAYS["an IPv4 socket"]))
    swallowed.start()
    swallowed.join()
    assert [text.partition(":")[0] for text in GUARD.taken()] == ["subprocess.Popen", "socket.__new__"]


def test_what_is_caught_meanwhile_fails_the_test(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a session of its own: fixtures of every scope, and a thing that swallows everything."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a plugin may start a process of its own, for git
    pytester.makeconftest("from tests.unit.conftest import *")
    pytester.makepyfile(
        """
        import subprocess
        import pytest

        @pytest.fixture(scope="session")
        def early():
            subprocess.run(["true"])

        @pytest.fixture(scope="module")
        def late():
            yield
            subprocess.run(["true"])

        def test_setup(early):
            pass

        def test_call():
            try:
                subprocess.run(["true"])
            except BaseException:
                pass

        def test_innocent():
            pass

        def test_teardown(late):
            pass
        """
    )
    result = pytester.inline_run("-p", "no:cacheprovider")
    passed, _, failed = result.listoutcomes()
    assert [report.nodeid.rpartition("::")[2] for report in passed] == ["test_innocent", "test_teardown"]
    assert [(report.nodeid.rpartition("::")[2], report.when) for report in failed] == [
        ("test_setup", "setup"), ("test_call", "call"), ("test_teardown", "teardown"),
    ]  # fmt: skip


def test_what_stays_within_the_process_is_allowed() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(b"x")
        assert far.recv(1) == b"x"


def _swallow(action: Callable[[], object]) -> None:
    with suppress(Forbidden):
        action()
