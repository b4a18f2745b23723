"""Inputs of a training step: images augmented and centred, all random numbers drawn, everything on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from warm_dist import rng
from warm_dist.config.run import Config
from warm_dist.data import Batch, DataInfo, centre
from warm_dist.diffusion.heads import Condition
from warm_dist.diffusion.process import Level, training_level
from warm_dist.distributed.world import use_device
from warm_dist.errors import Stopped
from warm_dist.training import augment


class Prepared(NamedTuple):
    """One rank's inputs of a step, on its device.

    x0: (B, C, H, W) float32, centred. level: (B,) float64 each. noise: shaped as x0. batch: what it was made from.
    """

    x0: Tensor
    level: Level
    noise: Tensor
    condition: Condition
    batch: Batch


def prepare(batch: Batch, config: Config, info: DataInfo, device: torch.device) -> Prepared:
    """Augment and centre a batch; every random number depends only on train.seed and the image's global position."""
    train, positions = config.train, [int(p) for p in batch.positions]
    uniform = rng.uniforms(train.seed, "augment", positions, 2)
    images = batch.images
    if train.horizontal_flips:
        flipped = uniform[:, 0] < 0.5
        images = images.copy()
        images[flipped] = images[flipped][..., ::-1]
    labels = batch.labels.copy()
    labels[uniform[:, 1] < train.label_dropout] = -1
    normal = torch.from_numpy(rng.normals(train.seed, "level", positions, (1,))[:, 0])
    ratio = torch.from_numpy(rng.uniforms(train.seed, "bnr", positions, 1)[:, 0])
    noise = rng.normals(train.seed, "noise", positions, images.shape[1:])

    def send(array: Any) -> Tensor:
        tensor = torch.as_tensor(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    x0 = centre(send(images), torch.tensor(info.channel_mean, device=device))
    condition: Condition = (send(labels),)
    if train.augment:
        drawn = augment.draw(train.seed, positions, train.augment, *images.shape[2:])
        x0 = augment.warp(x0, send(drawn.matrix))
        condition = (*condition, send(drawn.labels))
    level = training_level(config.process, normal, ratio, images.shape[3])  # on the host: equal on every device
    return Prepared(x0, Level(*map(send, level)), send(noise), condition, batch)


T = TypeVar("T")


class Prefetch(Generic[T]):
    """Runs `make` in a thread ahead of use: each `start` calls it once, each `take` returns the next result, in order.

    A context manager. make: returns a Tensor or nested tuples with Tensors among their items. On CUDA it runs in its
    own stream, so that pinned, non-blocking copies overlap with computation; it must not use tensors just made in
    another stream. What `make` raises, the corresponding `take` raises. The host never waits for the device.
    """

    def __init__(self, make: Callable[[], T], device: torch.device) -> None:
        self.make = make
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "prepare", initializer=use_device, initargs=(device,))
        self._ahead: deque[Future[tuple[T, torch.cuda.Event | None]]] = deque()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        stopped = kind is not None and issubclass(kind, Stopped)  # what is being made may never come
        self._pool.shutdown(wait=not stopped, cancel_futures=True)

    def __len__(self) -> int:
        """Number of calls started and not yet taken."""
        return len(self._ahead)

    def start(self) -> None:
        """Start one more call."""
        self._ahead.append(self._pool.submit(self._run))

    def take(self) -> T:
        """The result of the oldest call; its tensors are ready for the current stream."""
        result, copied = self._ahead.popleft().result()
        if copied is not None:
            current = torch.cuda.current_stream()
            current.wait_event(copied)
            for tensor in _tensors(result):  # keeps their memory from the next copy while a kernel reads it
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
