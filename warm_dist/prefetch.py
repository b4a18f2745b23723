"""Steps prepared ahead: by a thread, and on CUDA copied by a stream of their own while the step before computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from warm_dist.distributed.world import use_device

T = TypeVar("T")


class Prefetch(Generic[T]):
    """`with Prefetch(make, device) as ahead:` each `start` has the thread call `make` once, each `take` gives a result.

    make: returns a Tensor or nested tuples with Tensors among their items; on CUDA it runs in a stream of its own, so
    that pinned, non-blocking copies overlap with the computation, and it must not use what another stream just made.
    Results come in the order of the starts, and what `make` raised is raised by the `take` that is due for it. The host
    never waits for the device.
    """

    def __init__(self, make: Callable[[], T], device: torch.device) -> None:
        self.make = make
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "prepare", initializer=use_device, initargs=(device,))
        self._ahead: deque[Future[tuple[T, torch.cuda.Event | None]]] = deque()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __len__(self) -> int:
        """How many were started and not taken."""
        return len(self._ahead)

    def start(self) -> None:
        """Begin with one more."""
        self._ahead.append(self._pool.submit(self._run))

    def take(self) -> T:
        """The oldest one started; its tensors are ready for the stream that is current here."""
        result, copied = self._ahead.popleft().result()
        if copied is not None:
            current = torch.cuda.current_stream()
            current.wait_event(copied)
            for tensor in _tensors(result):  # or their memory would be given to the next copy while a kernel reads it
                if tensor.is_cuda:
                    tensor.record_stream(current)
        return result

    def _run(self) -> tuple[T, torch.cuda.Event | None]:
        if self.stream is None:
            return self.make(), None
        with torch.cuda.stream(self.stream):
            result = self.make()
            return result, self.stream.record_event()


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for item in tree:
            yield from _tensors(item)
