"""Find, wait for and end the processes that a test started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT
from warm_dist.supervisor import free_port

__all__ = ["MARK", "ROOT", "Found", "end_marked", "free_port", "marked", "wait_for"]

MARK = "WARM_DIST_TEST_MARK"
"""Set in a command's environment, it marks all that descends from it, whatever session or group that goes to."""


class Found(NamedTuple):
    """A living marked process and what it is: "rank 1", "launch.py", "runner" (deepspeed), "torchrun" or "other"."""

    pid: int
    role: str


def marked(mark: str) -> list[Found]:
    """All living processes with MARK=mark in their environment, by pid."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # ended meanwhile; a zombie's environment is empty
                environ = (entry / "environ").read_bytes().split(b"\0")
                if f"{MARK}={mark}".encode() in environ:
                    words = (entry / "cmdline").read_text().split("\0")
                    rank = next((word[5:].decode() for word in environ if word.startswith(b"RANK=")), None)
                    found.append(Found(int(entry.name), _role(words, rank)))
    return sorted(found)


def _role(words: list[str], rank: str | None) -> str:
    names = {Path(word).name for word in words}
    if "python" not in Path(words[0]).name:
        return "other"
    if "deepspeed.launcher.launch" in names:
        return "launch.py"
    if rank is None:
        return "runner" if "deepspeed" in names else "torchrun" if "torchrun" in names else "other"
    return f"rank {rank}" if "train.py" in names else "other"


def end_marked(mark: str) -> None:
    """kill -9 for all marked processes, for a test's last act."""
    for process in marked(mark):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 240) -> float:
    """Poll until true; returns the seconds that took. timeout_s: many processes may start on few, busy cores."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout_s, f"in vain: {what}"
        time.sleep(0.1)
    return time.monotonic() - began
