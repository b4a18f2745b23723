"""Deadlines for whole HTTP answers: a server that sends a byte now and then never exceeds the timeout of one read.

Python announces each request that http.client sends (audit event `http.client.send`), and boto3, MLflow's client and
urllib all send by it. Inside `with answers_within(seconds):` one thread shuts the sockets whose answers are late; the
reader then sees a lost connection.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_POLL_S = 0.25
_lock = threading.Lock()
_here = threading.local()  # .answers: the innermost `answers_within` of this thread
_started = False


class _Answers:
    """The requests of one thread: each connection's deadline, by its id, and those shut."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.pending: dict[int, tuple[float, Any]] = {}
        self.last, self.shut = 0, set[int]()

    def note(self, connection: Any) -> None:
        with _lock:
            self.last = id(connection)
            self.pending[self.last] = time.monotonic() + self.seconds, connection

    def shut_late_ones(self) -> None:
        now = time.monotonic()
        for key, (deadline, connection) in self.pending.items():
            if deadline < now:
                self.shut.add(key)
                with suppress(OSError, AttributeError):  # closed meanwhile
                    connection.sock.shutdown(socket.SHUT_RDWR)


_open: set[_Answers] = set()


@contextmanager
def answers_within(seconds: float) -> Iterator[None]:
    """Shut each connection of this thread whose answer has not arrived so many seconds after the last byte sent.

    The answer must be read inside. Nested, the innermost limit counts. Raises TimeoutError if the last request's was shut,
    whatever the client made of what had arrived.
    """
    _start()
    outer, answers = getattr(_here, "answers", None), _Answers(seconds)
    _here.answers = answers
    with _lock:
        _open.add(answers)
    try:
        yield
    finally:
        _here.answers = outer
        with _lock:
            _open.discard(answers)
        if answers.last in answers.shut:
            raise TimeoutError(f"the answer took longer than {seconds:g} s") from None


def _start() -> None:
    global _started
    with _lock:
        if not _started:
            _started = True
            sys.addaudithook(_note)
            threading.Thread(target=_watch, name="deadlines", daemon=True).start()


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "http.client.send" and (answers := getattr(_here, "answers", None)) is not None:
        answers.note(arguments[0])


def _watch() -> None:
    while True:
        time.sleep(_POLL_S)
        with _lock:
            for answers in _open:
                answers.shut_late_ones()
