"""Where a step's time goes, by place, without holding up the device."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

ON_HOST = ("data",)
"""Places whose time is the host's waiting; on CUDA all others are timed by events on the stream."""


class Stopwatch:
    """`at(place)` begins a place and ends the one before; `read` gives the seconds of each since the last `read`.

    On CUDA an event is recorded and nothing waits before `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._place, self._since = "", time.perf_counter()

    def at(self, place: str) -> None:
        """Begin a place; "" belongs to nothing and is not reported."""
        now = time.perf_counter()
        if not self._cuda or self._place in ON_HOST:
            self._seconds[self._place] += now - self._since
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((place, event))
        self._place, self._since = place, now

    def read(self) -> dict[str, float]:
        """Seconds by place, closed places only; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            for (place, begun), (_, ended) in zip(self._events, self._events[1:], strict=False):
                if place not in ON_HOST:
                    self._seconds[place] += begun.elapsed_time(ended) / 1000
            del self._events[:-1]
        out = {place: seconds for place, seconds in self._seconds.items() if place}
        self._seconds.clear()
        return out
