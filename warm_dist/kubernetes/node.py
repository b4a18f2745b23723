"""What one node of a cluster runs: torchrun with the node's share of the ranks, which ends with the run's own exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from warm_dist.config.run import Config
from warm_dist.runs.folder import read_end
from warm_dist.supervisor import become_subreaper

# What a run's MLflow mirror may still need at its end (a finished one's sends the model): it would go with the container.
STOPPED_S, FINISHED_S = 45.0, 600.0


def run_node(config: Config, arguments: list[str]) -> int:
    """Run `launch.train` with these arguments under torchrun; returns the run's exit code, or torchrun's if it left none."""
    become_subreaper()  # orphans come to us, as they do to a container's first process
    run, began = Path(config.output), time.time()
    code = _torchrun(arguments)
    end = read_end(run, since=began)
    _wait_for_orphans(STOPPED_S if code else FINISHED_S, config.parallel.preemption_file)
    if code and end and end["code"]:  # torchrun's own code says only that a rank has failed
        print(f"node: {end['reason']}", file=sys.stderr, flush=True)
        return int(end["code"])
    return code if code >= 0 else 128 - code


def _torchrun(arguments: list[str]) -> int:
    """Its exit code, negative after a signal; SIGTERM and SIGINT reach it."""
    told = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, told)  # until there is somebody to pass them to
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "-m", "launch.train", *arguments],
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, told),
    )
    for signum in told:
        signal.signal(signum, lambda number, _: process.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, told)
    return process.wait()


def _wait_for_orphans(longest_s: float, stop_file: str | None) -> None:
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
