"""What training knows of a data set: batches, statistics, and scaling of pixels to [-1, 1] and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # packing and a trial's actor save 2 s and 350 MB without torch
    from torch import Tensor

LOW_MODES = 4
"""Cold sampling starts from a Gaussian over the 4 x 4 lowest DCT modes: at α = W/2 the fifth has shrunk by 4e8."""

MIN_SIGMA_DATA = 1e-3
"""An eighth of a grey level, of 2/255: less contrast than one level in a sixtieth of all pixels."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, ordered by global position.

    images: (B, C, H, W) uint8. labels: (B,) int64, all -1 in a data set without classes.
    positions: (B,) int64, global image positions (0 is the first image ever consumed). keys: the samples' names.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class DataInfo:
    """Statistics of a data set for training and sampling, measured when packing and kept in the manifest's header.

    All are of images scaled to [-1, 1]. channel_mean: (C,). mean_image: (C, H, W), channel means not subtracted.
    power_spectrum: (H, W), S_k = E[u0_k^2], the mean over images and channels of the squared orthonormal DCT-II
    coefficients after subtracting the channel means. sigma_data: sqrt(mean_k S_k).
    low_mean, low_covariance: (K,), (K, K) of the lowest 4 x 4 coefficients, K = C·16, channel by channel, row by row,
    where cold sampling starts; channel means subtracted. class_counts: (num_classes,) images of each class; empty without
    classes, and in weights of older versions.
    """

    resolution: int
    channels: int
    num_classes: int
    num_images: int
    channel_mean: NDArray[np.float64]
    mean_image: NDArray[np.float64]
    power_spectrum: NDArray[np.float64]
    sigma_data: float
    low_mean: NDArray[np.float64]
    low_covariance: NDArray[np.float64]
    fingerprint: str
    class_counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def to_json(self) -> dict[str, Any]:
        """Convert to lists and numbers; `from_json` restores arrays that are equal to the last bit."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}

    def flaw(self) -> str:
        """Why nothing can be learned from these data; "" if something can."""
        if self.sigma_data >= MIN_SIGMA_DATA:
            return ""
        colour = ", ".join(f"{(mean + 1) * 127.5:.0f}" for mean in self.channel_mean)
        return f"all images are one colour, {colour} of 255 (sigma_data {self.sigma_data:.1e}); check how they were exported"

    @staticmethod
    def from_json(tree: dict[str, Any]) -> DataInfo:
        """The inverse of `to_json`. Raises TypeError for missing or unknown keys."""
        values: dict[str, Any] = {k: np.asarray(v, np.float64) if isinstance(v, list) else v for k, v in tree.items()}
        return DataInfo(**values)


class Reader(Protocol):
    """The interface of a data set's reader that training and evaluation use: `data_pipelines.reading.loader.Loader`."""

    @property
    def info(self) -> DataInfo:
        """The data set's statistics."""

    def batches(self, nimg: int) -> Iterator[Batch]:
        """This rank's batches from global position nimg on, endlessly."""

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read images by their rows in the manifest: (len(rows), C, H, W) uint8."""

    def describe(self) -> list[str]:
        """Lines to print: threads, memory, what was checked."""

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes held at once so far."""

    def close(self) -> None:
        """Stop the threads."""


def centre(images: Tensor, channel_mean: Tensor) -> Tensor:
    """Scale (B, C, H, W) uint8 to float32 in [-1, 1] and subtract the data set's channel means (C,)."""
    values = images.float()
    values = values / values.new_full((), 127.5)  # CUDA multiplies by a plain number's rounded reciprocal
    return values - 1 - channel_mean[:, None, None].float()


def to_uint8(x: Tensor, channel_mean: Tensor) -> Tensor:
    """The inverse of `centre`, rounded and clipped to 0 … 255."""
    return ((x + channel_mean[:, None, None].to(x)) * 127.5 + 128).clamp(0, 255).byte()
