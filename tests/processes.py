"""Start a set of ranks as real processes, as a launcher would, on a free loopback port; and find what a test started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from launch.services import free_port

__all__ = ["MARK", "ROOT", "Found", "end_marked", "free_port", "marked", "run_ranks", "wait_for"]

ROOT = Path(__file__).resolve().parent.parent
MARK = "WARM_DIST_TEST_MARK"
"""Set in a command's environment, it marks all that descends from it, whatever session or group that goes to."""


def run_ranks(command: Sequence[str], size: int, timeout_s: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """`python command…` once a rank; all are ended when one has not after timeout_s."""
    port = str(free_port())
    common = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    common |= {"LOCAL_WORLD_SIZE": str(size), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


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
        time.sleep(0.02)
    return time.monotonic() - began
