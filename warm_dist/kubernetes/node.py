"""Runs one cluster node's share of the ranks under torchrun, and returns the run's own exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from warm_dist.config.run import Config
from warm_dist.errors import print_line
from warm_dist.runs.folder import read_end
from warm_dist.supervisor import REQUESTS, become_subreaper, on_request

# Time for the MLflow mirror to finish before the container ends; after a finished run it also sends the model.
STOPPED_S, FINISHED_S = 45.0, 600.0


def run_node(config: Config, arguments: list[str]) -> int:
    """Run `launch.train` with these arguments under torchrun; returns the run's exit code, or torchrun's if it left none."""
    become_subreaper()  # adopt orphans, as a container's first process does
    run, began = Path(config.output), time.time()
    stop_file = _unless_there(config.parallel.preemption_file)
    code = _torchrun(arguments)
    end = read_end(run, since=began)
    if code:  # a file made meanwhile is what stopped the run, and no new request
        stop_file = _unless_there(stop_file)
    _wait_for_orphans(STOPPED_S if code else FINISHED_S, stop_file)
    if code and end and end.code:  # torchrun's own code says only that a rank failed
        print_line(f"node: {end.reason}")
        return end.code
    return code if code >= 0 else 128 - code


def _torchrun(arguments: list[str]) -> int:
    """Run torchrun and pass it requests to stop and SIGINT; returns its exit code, negative after a signal."""
    passed = {signal.SIGINT, *REQUESTS}
    signal.pthread_sigmask(signal.SIG_BLOCK, passed)  # until the process exists
    process = subprocess.Popen(
        [sys.executable, "-m", "warm_dist.distributed.torchrun", "-m", "launch.train", *arguments],
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, passed),
    )
    # torchrun would die of the others
    on_request(
        lambda number, _: process.send_signal(number if number == signal.SIGINT else signal.SIGTERM), signal.SIGINT
    )
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed)
    return process.wait()


def _unless_there(path: str | None) -> str | None:
    return None if path is None or os.path.exists(path) else path


def _wait_for_orphans(longest_s: float, stop_file: str | None) -> None:
    """Wait until all orphans have ended, for `longest_s` at most, or until a request to stop or the stop file arrives."""
    asked: list[int] = []
    on_request(lambda number, _: asked.append(number), signal.SIGINT)
    deadline = time.monotonic() + longest_s
    with suppress(ChildProcessError):
        while time.monotonic() < deadline and not asked:
            if stop_file is not None and os.path.exists(stop_file):
                return
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
