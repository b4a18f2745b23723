"""The records that travel between the parts of the system."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # a trial's actor in Ray does without torch: 2 s and 350 MB
    from torch import Tensor

LOW_MODES = 4
"""Cold sampling starts from a Gaussian over the 4 x 4 lowest DCT modes: at α = W/2 the fifth has shrunk by 4e8."""


class Level(NamedTuple):
    """A place in the (alpha, sigma) plane, one per image.

    sigma: (B,) noise standard deviation, data units. alpha: (B,) standard deviation of the Gaussian blur, pixels.
    """

    sigma: Tensor
    alpha: Tensor


class Heads(NamedTuple):
    """What the network knows about x0: the denoised but blurry image E[A x0 | x] and the residual E[(I - A) x0 | x].

    Both (B, C, H, W), data units. Their sum is the denoised clean image.
    """

    blurry: Tensor
    residual: Tensor

    @property
    def clean(self) -> Tensor:
        """x0 estimate, (B, C, H, W)."""
        return self.blurry + self.residual


class Loss(NamedTuple):
    """Mean squared error per pixel in network units, (B,) float32 each; `total` carries the residual's weight.

    inconsistency: |b̂ − A x̂0| / |b̂|, how far the two heads are from one image; without gradient.
    """

    blurry: Tensor
    residual: Tensor
    total: Tensor
    inconsistency: Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of one global batch, in the order of global positions.

    images: (B, C, H, W) uint8. labels: (B,) int64, all -1 in a data set without classes.
    positions: (B,) int64, global image positions (0 is the first image ever consumed). keys: the samples' names.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class DataInfo:
    """What training and sampling must know of a data set; measured at packing, kept in the manifest's header.

    Images are scaled to [-1, 1]. channel_mean: (C,). mean_image: (C, H, W), channel means not subtracted.
    power_spectrum: (H, W), S_k = E[u0_k^2], the mean over images and channels of the squared orthonormal DCT-II
    coefficients after the channel means are subtracted. sigma_data: sqrt(mean_k S_k).
    low_mean, low_covariance: (K,), (K, K) of the lowest 4 x 4 coefficients, K = C·16, channel by channel, row by row,
    where cold sampling starts; channel means subtracted.
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

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_json` gives back equal arrays to the last bit."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}

    @staticmethod
    def from_json(tree: dict[str, Any]) -> DataInfo:
        """Raises TypeError for missing or unknown keys."""
        values: dict[str, Any] = {k: np.asarray(v, np.float64) if isinstance(v, list) else v for k, v in tree.items()}
        return DataInfo(**values)


class Store(Protocol):
    """What checkpoints need of data_pipelines.store.Store, which says what each of these does and raises."""

    url: str

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def upload(self, path: str, local_file: Path) -> None: ...
    def download(self, path: str, local_file: Path) -> None: ...
    def list(self, prefix: str = "") -> Mapping[str, Any]: ...
    def delete(self, path: str) -> None: ...


OpenStore = Callable[[str, str | None], Store]
"""data_pipelines.store.open_store: (URL or folder, endpoint or None) → Store."""
