"""What descends from a process: who it is, what it listens on, and that its end leaves none of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil

from warm_dist import supervisor


def descendants(pid: int) -> set[int]:
    """The process and all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return {pid}


def listening(pids: set[int]) -> set[str]:
    """Hexadecimal addresses of every listening TCP socket of these processes, IPv4 and IPv6."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def ends_cleanly(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """The exit code is 0 and no process of its tree is left."""
    family = [supervisor.identity(pid) for pid in descendants(process.pid) - {process.pid}]
    process.send_signal(number)
    process.communicate(timeout=30)
    return process.returncode == 0 and not [who for who in family if supervisor.alive(who)]
