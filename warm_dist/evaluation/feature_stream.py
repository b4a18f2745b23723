"""Features of numbered images, batch by batch on all ranks: sums for mean and covariance, and a few rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from warm_dist.distributed.collectives import add_up, collect, gather
from warm_dist.distributed.world import World
from warm_dist.errors import DataError, WarmDistError
from warm_dist.evaluation.frechet import Moments

Images = NDArray[np.uint8] | Tensor


class Extractor(Protocol):
    """Turns images into feature vectors. sha256: of the weights. resize: how images get to the input's size."""

    name: str
    sha256: str
    resize: str
    num_features: int

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """images: (B, C, H, W) uint8, C = 1 or 3. Returns (B, num_features) float32."""
        ...


def features(extractor: Extractor, images: Images, batch_size: int) -> NDArray[np.float32]:
    """Features of any number of images: (N, C, H, W) uint8 → (N, num_features) float32.

    Raises ValueError for floats, DataError if the network returns an unexpected shape or features that are not finite.
    """
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: {images.dtype} {tuple(images.shape)}, needs uint8 (N, C, H, W)")
    out = np.empty((len(images), extractor.num_features), np.float32)
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        rows = extractor(part)
        if rows.shape != (len(part), extractor.num_features):
            raise DataError(
                f"{extractor.name}: {rows.shape} for {len(part)} images, needs {(len(part), extractor.num_features)}; "
                "the network of eval.extractor_url must treat every image alone"
            )
        if sick := int((~np.isfinite(rows)).any(axis=1).sum()):
            raise DataError(
                f"{extractor.name} gives features that are not finite for {sick} of {len(part)} images; "
                "use other weights, or float32 (eval.extractor_bf16 false)"
            )
        out[start : start + batch_size] = rows
    return out


Rows = NDArray[np.float32]


def batches_of(world: World, num_images: int, batch_size: int) -> tuple[list[range], int]:
    """This rank's batches of the image numbers 0 … num_images - 1, and the most batches of any rank.

    Whole batches are dealt in turn, so that an image's batch, and thus its bits, do not depend on the world size. With
    fewer batches than ranks the batches are made smaller.
    """
    size = batch_size if -(-num_images // batch_size) >= world.size else -(-num_images // world.size)
    starts = range(0, num_images, size)
    mine = [range(low, min(low + size, num_images)) for low in starts[world.rank :: world.size]]
    return mine, -(-len(starts) // world.size)


def each_batch(
    world: World, num_images: int, batch_size: int, work: Callable[[range], None], after: Callable[[int], None]
) -> None:
    """Call `work` on each of this rank's batches of `batches_of`. A collective.

    after: called after each with its size, equally often on every rank (with 0 if no batch is left), so it may be a
    collective. A rank's first WarmDistError ends its work; at the end the lowest rank's error is raised on all ranks.
    """
    mine, most = batches_of(world, num_images, batch_size)
    problem: WarmDistError | None = None
    for numbers in [*mine, *[range(0)] * (most - len(mine))]:
        if numbers and problem is None:
            try:
                work(numbers)
            except WarmDistError as error:
                problem = error
        after(len(numbers))
    if problems := [error for error in gather(world, problem, "problems") if error]:
        raise problems[0]


class FeatureStream:
    """Accumulates features of images, added in any order, without keeping the images.

    parts: sets of images to compute moments of, as masks (num_images,). kept: mask of the images whose rows to keep.
    """

    def __init__(
        self, world: World, extractor: Extractor, parts: Sequence[NDArray[np.bool_]], kept: NDArray[np.bool_]
    ) -> None:
        self.world, self.extractor, self.parts, self.kept = world, extractor, parts, kept
        self.moments = [Moments.zeros(extractor.num_features) for _ in parts]
        self._rows: list[tuple[int, Rows]] = []

    def add(self, numbers: range, images: NDArray[np.uint8] | Tensor) -> None:
        """Add the images with these numbers, (len(numbers), C, H, W) uint8. Raises as `features`."""
        rows = features(self.extractor, images, len(numbers))
        here = slice(numbers.start, numbers.stop)
        for mask, moments in zip(self.parts, self.moments, strict=True):
            moments.add(rows[mask[here]])
        if self.kept[here].any():
            self._rows.append((numbers.start, rows[self.kept[here]]))

    def result(self) -> tuple[list[Moments], Rows]:
        """The moments over all ranks, and on rank 0 the kept rows in the images' order. A collective."""
        moments = [Moments.from_flat(add_up(self.world, part.flat(), "moments")) for part in self.moments]
        parts = collect(self.world, self._rows, "rows")
        pieces = sorted((piece for part in parts for piece in part), key=itemgetter(0))
        empty = np.empty((0, self.extractor.num_features), np.float32)
        return moments, np.concatenate([empty, *(rows for _, rows in pieces)])
