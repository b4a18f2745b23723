"""Requests to stop as a flag for the training loop, or as an exception where nothing is there to be saved."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from warm_dist import supervisor
from warm_dist.distributed.collectives import PeerLost, gather
from warm_dist.distributed.world import World
from warm_dist.errors import Stopped


class StoppedAtOnce(Stopped):
    """A stop that this rank heeds alone, without a word to the others."""


class StopSignal:
    """Records SIGINT or one of `supervisor.REQUESTS`, so that the loop can finish its step, save, and exit resumably.

    name: what asked to stop, None if nothing did.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._at_once = False

    def install(self) -> StopSignal:
        """Handle these signals (main thread only). A second signal changes nothing: a save is in progress.

        A rank whose launcher is killed gets SIGTERM too: it saves and exits instead of training on alone.
        """
        if "LOCAL_RANK" in os.environ:  # started by a launcher, not by a shell that may close
            supervisor.end_with_parent(signal.SIGTERM)
        supervisor.on_request(self._note, signal.SIGINT)
        return self

    @contextmanager
    def at_once(self, doing: str) -> Iterator[None]:
        """Inside, a stop ends any wait for a peer or a server. Raises StoppedAtOnce with what was being done."""
        try:
            try:
                self._at_once = True
                if self.name:
                    raise KeyboardInterrupt
                yield
            finally:
                self._at_once = False
        except KeyboardInterrupt:  # unlike Stopped, no library takes it for a failure of its own
            host = socket.gethostname()
            raise StoppedAtOnce(f"{self.name} on host {host} while {doing}; run the same command again") from None

    def _note(self, number: int, frame: object) -> None:
        self.name = self.name or signal.Signals(number).name  # keep the first: launchers follow Ctrl-C with SIGTERM
        if self._at_once:
            self._at_once = False
            raise KeyboardInterrupt

    def reason(self, world: World) -> str:
        """What stopped the run, and where: `SIGTERM on rank 1 (host node2)`. A collective."""
        mine = f"{self.name} on rank {world.rank} (host {socket.gethostname()})" if self.name else None
        reasons: list[str | None] = []
        with suppress(PeerLost):
            reasons = gather(world, mine, "stop")
        return next(filter(None, reasons), mine or "a stop on another rank")
