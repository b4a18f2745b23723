"""The records that travel between the parts of the system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


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


class Store(Protocol):
    """What checkpoints need of warm_dist.store.base.Store, which says what each of these does and raises."""

    url: str

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def upload(self, path: str, local_file: Path) -> None: ...
    def download(self, path: str, local_file: Path) -> None: ...
    def list(self, prefix: str = "") -> Mapping[str, Any]: ...
    def delete(self, path: str) -> None: ...
