"""Spreads work over processes that end with their owner."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import islice
from typing import TypeVar

from warm_dist import supervisor
from warm_dist.errors import ConfigError, Stopped
from warm_dist.store.base import Store
from warm_dist.store.open import open_store

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(work: Callable[[Task], Result], tasks: Iterable[Task], count: int) -> Iterator[Result]:
    """Apply `work` to every task; yields results as they complete. The first error cancels the remaining tasks.

    count: number of processes; 1 uses this one. With more, `work` and the tasks must be picklable and the caller's script
    importable. Raises ConfigError for a count below 1, Stopped if a process was killed, and what `work` raises.
    """
    if count < 1:
        raise ConfigError(f"{count} workers: must be at least 1")
    if count == 1:
        yield from map(work, tasks)
        return
    remaining = iter(tasks)
    # spawn, because a fork would copy locks that other threads hold
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, (os.getpid(),))

    def submit(task: Task) -> Future[Result]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a process that this starts inherits it:
        try:  # Ctrl-C reaches the whole group, and the owner handles it
            return pool.submit(work, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        pending: set[Future[Result]] = {submit(task) for task in islice(remaining, 2 * count)}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            pending |= {submit(task) for task in islice(remaining, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        advice = "run the same command again, with fewer --workers to use less"
        raise Stopped(f"a worker process was killed (out of memory?); {advice}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@lru_cache(maxsize=4)
def shared_store(url: str, endpoint_url: str | None) -> Store:
    """`open_store`, cached: creating an S3 client takes as long as packing fifty images."""
    return open_store(url, endpoint_url)


def _begin(owner: int) -> None:
    supervisor.end_with_parent(signal.SIGKILL)
    if os.getppid() != owner:  # the owner ended before the kernel was asked
        os._exit(1)
