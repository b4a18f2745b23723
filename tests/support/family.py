"""What descends from a process: who it is, and that its end leaves none of it."""

from __future__ import annotations

import contextlib
import signal
import subprocess

import psutil

from warm_dist import supervisor


def descendants(pid: int) -> set[int]:
    """The process and all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return {pid}


def ends_cleanly(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """The exit code is 0 and no process of its tree is left."""
    family = [supervisor.identity(pid) for pid in descendants(process.pid) - {process.pid}]
    process.send_signal(number)
    process.communicate(timeout=30)
    return process.returncode == 0 and not [who for who in family if supervisor.alive(who)]
