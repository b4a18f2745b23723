"""Requests to stop as a flag for the training loop, or as an exception where a wait would keep it from being seen."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from warm_dist import supervisor
from warm_dist.distributed.collectives import PeerLost, gather
from warm_dist.distributed.world import World
from warm_dist.errors import Stopped, end

PATIENCE_S = 3.0  # after a stop, for a batch or a peer's sign of life: what comes by then is still trained on and saved
_POLL_S = 0.2
_UNWIND_S = 1.0  # for the main thread to leave a wait; inside torch it handles no signal


class StoppedAtOnce(Stopped):
    """A stop that this rank heeds alone, without a word to the others. what: the signal, and what it ended."""

    def __init__(self, what: str, kept: str = "") -> None:
        super().__init__("; ".join(filter(None, (what, kept, "run the same command again"))))
        self.what = what


@dataclass
class _Wait:
    doing: str
    patience_s: float
    begun: float
    raised: bool = False


class StopSignal:
    """Records SIGINT or one of `supervisor.REQUESTS`, so that the loop can finish its step, save, and exit resumably.

    hindrance: tells for whom a stop waits in vain; asked again and again after one, and believed after PATIENCE_S.
    abandon: ends the process for a main thread that cannot; called from another thread.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._asked = 0.0
        self._wait: _Wait | None = None
        self.hindrance: Callable[[], str | None] = lambda: None
        self.abandon: Callable[[StoppedAtOnce], None] = end

    @property
    def name(self) -> str | None:
        """What asked to stop, None if nothing did."""
        return self._name

    @name.setter
    def name(self, name: str | None) -> None:
        if self._name is None:
            self._asked = time.monotonic()
        self._name = name

    def install(self) -> StopSignal:
        """Handle these signals (main thread only). A second signal changes nothing: a save is in progress.

        A rank whose launcher is killed gets SIGTERM too: it saves and exits instead of training on alone.
        """
        if "LOCAL_RANK" in os.environ:  # started by a launcher, not by a shell that may close
            supervisor.end_with_parent(signal.SIGTERM)
        supervisor.on_request(self._note, signal.SIGINT)
        came, told = os.pipe()  # the kernel's word reaches a thread even while the main one is inside torch
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(came,), name="stop", daemon=True).start()
        return self

    @contextmanager
    def at_once(self, doing: str, patience_s: float = 0.0) -> Iterator[None]:
        """Inside, a stop ends any wait for a peer or a server, patience_s after both have begun.

        Raises StoppedAtOnce with what was being done.
        """
        wait = _Wait(doing, patience_s, time.monotonic())
        try:
            try:
                self._wait = wait
                if self._name and not patience_s:
                    raise KeyboardInterrupt
                yield
            finally:
                self._wait = None
        except KeyboardInterrupt:  # unlike Stopped, no library takes it for a failure of its own
            self._wait = None
            raise self._stopped(doing) from None

    def _stopped(self, doing: str) -> StoppedAtOnce:
        return StoppedAtOnce(f"{self._name} on host {socket.gethostname()} while {doing}")

    def _note(self, number: int, frame: object) -> None:
        self._noted(number)
        wait = self._wait
        if wait and not wait.raised and self._overdue_s(wait) >= 0:
            wait.raised = True
            raise KeyboardInterrupt

    def _noted(self, number: int) -> None:
        self.name = self.name or signal.Signals(number).name  # keep the first: launchers follow Ctrl-C with SIGTERM

    def _overdue_s(self, wait: _Wait) -> float:
        return time.monotonic() - max(self._asked, wait.begun) - wait.patience_s

    def _watch(self, came: int) -> None:
        stops = {signal.SIGINT, *supervisor.REQUESTS}
        while True:
            if select.select([came], [], [], _POLL_S)[0]:
                for number in stops.intersection(os.read(came, 64)):
                    self._noted(number)
            if self._name:
                self._hasten()

    def _hasten(self) -> None:
        """After a stop: interrupt a wait whose patience is over, or end the process if that cannot be."""
        wait = self._wait
        if wait is None:
            doing = self.hindrance()
            if doing and time.monotonic() > self._asked + PATIENCE_S:
                self.abandon(self._stopped(doing))
        elif self._overdue_s(wait) > _UNWIND_S:
            self.abandon(self._stopped(wait.doing))
        elif self._overdue_s(wait) > 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def reason(self, world: World) -> str:
        """What stopped the run, and where: `SIGTERM on rank 1 (host node2)`. A collective."""
        mine = f"{self.name} on rank {world.rank} (host {socket.gethostname()})" if self.name else None
        reasons: list[str | None] = []
        with suppress(PeerLost):
            reasons = gather(world, mine, "stop")
        return next(filter(None, reasons), mine or "a stop on another rank")
