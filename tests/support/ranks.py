"""A set of ranks as real processes, as a launcher would start them, on a free loopback port."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from tests.support.processes import free_port
from tests.support.zygote import Forked, zygote


def environments(size: int) -> list[dict[str, str]]:
    """Each rank's environment: ours, with what torchrun sets."""
    shared = {**os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def start_ranks(*args: str, size: int = 2, env: Mapping[str, str] | None = None) -> list[Forked]:
    """`python ARGS…` once a rank."""
    return [zygote().start(*args, env=rank | dict(env or {})) for rank in environments(size)]


def run_ranks(*args: str, size: int, timeout_s: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """The same to its end; all are killed when one has not ended after timeout_s."""
    ranks = start_ranks(*args, size=size)
    try:
        outputs = [rank.communicate(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [
        subprocess.CompletedProcess(rank.args, rank.wait(), *said) for rank, said in zip(ranks, outputs, strict=True)
    ]
