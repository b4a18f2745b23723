"""SIGTERM and SIGINT as a flag that the training loop reads."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress

from warm_dist import supervisor
from warm_dist.distributed.collectives import PeerLost, gather
from warm_dist.distributed.world import World


class StopSignal:
    """SIGTERM and SIGINT become a flag: the loop ends after its step, saves, and exits resumably."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> StopSignal:
        """Take over both signals (main thread only). A launcher's second signal changes nothing: a save is under way.

        A rank whose launcher was killed with -9 gets SIGTERM too: it saves and ends instead of training on alone.
        """
        if "LOCAL_RANK" in os.environ:  # a launcher started us, not a shell that may close
            supervisor.end_with_parent(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.name = self.name or signal.Signals(number).name  # the first: a launcher answers Ctrl-C with SIGTERM

    def reason(self, world: World) -> str:
        """What stopped the run, and where: `SIGTERM on rank 1 (host node2)`. A collective."""
        mine = f"{self.name} on rank {world.rank} (host {socket.gethostname()})" if self.name else None
        told: list[str | None] = []
        with suppress(PeerLost):
            told = gather(world, mine, "stop")
        return next((name for name in told if name), mine or "a stop on another rank")
