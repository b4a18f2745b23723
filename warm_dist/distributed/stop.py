"""SIGTERM and SIGINT as a flag for the training loop."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress

from warm_dist import supervisor
from warm_dist.distributed.collectives import PeerLost, gather
from warm_dist.distributed.world import World


class StopSignal:
    """Records SIGTERM or SIGINT, so that the loop can finish its step, save, and exit resumably.

    name: what asked to stop, None if nothing did.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> StopSignal:
        """Handle both signals (main thread only). A second signal changes nothing: a save is in progress.

        A rank whose launcher is killed gets SIGTERM too: it saves and exits instead of training on alone.
        """
        if "LOCAL_RANK" in os.environ:  # started by a launcher, not by a shell that may close
            supervisor.end_with_parent(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.name = self.name or signal.Signals(number).name  # keep the first: launchers follow Ctrl-C with SIGTERM

    def reason(self, world: World) -> str:
        """What stopped the run, and where: `SIGTERM on rank 1 (host node2)`. A collective."""
        mine = f"{self.name} on rank {world.rank} (host {socket.gethostname()})" if self.name else None
        reasons: list[str | None] = []
        with suppress(PeerLost):
            reasons = gather(world, mine, "stop")
        return next(filter(None, reasons), mine or "a stop on another rank")
