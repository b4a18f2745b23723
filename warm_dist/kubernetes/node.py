"""What one node of a cluster runs: torchrun with the node's share of the ranks, and then the run's own exit code.

`python launch/node.py --config …` takes launch/train.py's arguments. How many nodes and processes there are, and where
rank 0 is, torchrun reads from PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, as
Kubeflow Trainer sets them. It can be a container's first process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# What a run's MLflow mirror may still need at its end (a finished one's sends the model): it would go with the container.
STOPPED_S, FINISHED_S = 45.0, 600.0
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def torchrun(arguments: list[str]) -> int:
    """Its exit code, negative after a signal; SIGTERM and SIGINT reach it."""
    told = {signal.SIGTERM, signal.SIGINT}
    train = str(Path(__file__).resolve().with_name("train.py"))
    signal.pthread_sigmask(signal.SIG_BLOCK, told)  # until there is somebody to pass them to
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", train, *arguments],
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, told),
    )
    for signum in told:
        signal.signal(signum, lambda number, _: process.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, told)
    return process.wait()


def wait_for_orphans(longest_s: float, stop_file: str | None) -> None:
    """Until all have ended, or somebody asks to stop, again or only now."""
    asked: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: asked.append(number))
    known = stop_file is not None and os.path.exists(stop_file)
    deadline = time.monotonic() + longest_s
    with suppress(ChildProcessError):
        while time.monotonic() < deadline and not asked:
            if not known and stop_file is not None and os.path.exists(stop_file):
                return
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
