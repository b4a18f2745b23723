"""Non-finite steps: every rank learns of one two steps later, without a host sync, and its samples are reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from warm_dist.distributed.collectives import Flags, gather
from warm_dist.distributed.world import World
from warm_dist.errors import NumericsError


class Trace(NamedTuple):
    """What to report if a step was non-finite: the samples' keys, their sigma (B,), and losses (B,) per micro-batch."""

    nimg: int
    keys: tuple[str, ...]
    sigma: Tensor
    totals: list[Tensor]


class NonFiniteGuard:
    """Shares two flags with all ranks, one step late: stop requested, step non-finite.

    The engine skips a non-finite update; the guard counts it in `skipped`, calls `report`, and raises NumericsError
    after `limit` of them in a row.
    """

    def __init__(self, world: World, limit: int, report: Callable[[int, str], None]) -> None:
        self.world, self.limit, self.report = world, limit, report
        self.skipped = 0
        self._in_a_row = 0
        self._flags = Flags(world, 2)
        self._coming: Trace | None = None  # its flag is being copied to the host
        self._posted: Trace | None = None  # its flag is being sent to the other ranks
        self._bad = torch.zeros(1, dtype=torch.bool)
        self._copied: torch.cuda.Event | None = None

    def check(self, stop: bool, trace: Trace, bad: Tensor) -> bool:
        """Call after each step: read the flags sent a step ago, send new ones. A collective.

        bad: (1,) bool on the device, whether this step was non-finite. Returns True if any rank was asked to stop.
        Raises NumericsError.
        """
        stopping = self._receive()
        self._post(stop)
        self._coming = trace
        cuda = bad.device.type == "cuda"
        self._bad = torch.empty(1, dtype=torch.bool, pin_memory=cuda)
        self._bad.copy_(bad, non_blocking=True)
        if cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return stopping

    def settle(self) -> bool:
        """Read all flags under way, so that no save follows an unread one. A collective; see `check`."""
        stopping = self._receive()
        self._post(False)
        return self._receive() or stopping

    def _post(self, stop: bool) -> None:
        broken = False
        if self._coming is not None:
            if self._copied is not None:
                self._copied.synchronize()  # it has had a whole step's time
            broken = bool(self._bad)
        self._flags.post(stop, broken)
        self._posted, self._coming = self._coming, None

    def _receive(self) -> bool:
        stopping, broken = self._flags.read()
        trace, self._posted = self._posted, None
        if trace is None:
            return stopping
        if not broken:
            self._in_a_row = 0
            return stopping
        self._in_a_row += 1
        self.skipped += 1
        mine = self._samples(trace)
        found = [line for lines in gather(self.world, mine) for line in lines]
        where = "; ".join(found[:4]) if found else f"gradient norm at nimg {trace.nimg}, every loss finite"
        if self._in_a_row >= self.limit:
            times = "" if self.limit == 1 else f" in {self.limit} steps in a row, at last"
            raise NumericsError(
                f"non-finite{times}: {where}. The update was not applied; the last checkpoint is untouched"
            )
        self.report(trace.nimg, f"non-finite, update left out ({self._in_a_row} of {self.limit} in a row): {where}")
        return stopping

    def _samples(self, trace: Trace) -> list[str]:
        rows = zip(trace.keys, trace.sigma.tolist(), torch.cat(trace.totals).tolist(), strict=True)
        return [
            f"rank {self.world.rank} nimg {trace.nimg} sample {key} at sigma {sigma:.3g}"
            for key, sigma, total in rows
            if not torch.isfinite(torch.tensor(total))
        ]
