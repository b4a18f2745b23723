"""Start a set of ranks as real processes, as a launcher would, on a free loopback port."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.services import free_port

__all__ = ["ROOT", "free_port", "run_ranks"]

ROOT = Path(__file__).resolve().parent.parent


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
