"""The guard itself: every way to start a process or to open a socket is refused, wherever it happens."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
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
    "a host's address": lambda: socket.gethostbyname("localhost"),
    "a socket that is a file": lambda: socket.socket(socket.AF_UNIX).bind("\0guard"),
    "a listener": lambda: multiprocessing.connection.Listener(family="AF_UNIX"),
    "C's system": lambda: ctypes.CDLL(None).system(b"true"),
    "C's fork": lambda: ctypes.CDLL(None).fork() or os._exit(0),
    "ranks": lambda: torch.distributed.distributed_c10d.init_process_group("gloo", rank=0, world_size=1),
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


def test_a_file_that_starts_a_process_when_it_is_read_is_an_error(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a process is started before the first test, and shared by all. The second file swallows the refusal."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest("from tests.unit.conftest import *")
    start = 'import subprocess\n{}subprocess.run(["true"])\n{}\n\ndef test():\n    pass\n'
    swallowed = start.format("try:\n    ", "except BaseException:\n    pass")
    pytester.makepyfile(
        test_loud=start.format("", ""), test_swallowed=swallowed, test_innocent="def test():\n    pass\n"
    )
    result = pytester.inline_run("-p", "no:cacheprovider", "--continue-on-collection-errors")
    passed, _, failed = result.listoutcomes()
    assert [report.nodeid for report in passed] == ["test_innocent.py::test"]
    assert [report.nodeid for report in failed] == ["test_loud.py", "test_swallowed.py"]
