"""Streaming statistics of a data set: sums per shard that add up to a manifest's `DataInfo`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

from warm_dist.data import LOW_MODES, DataInfo

BATCH_BYTES = 16 << 20  # of float64 pixels


@dataclass
class Statistics:
    """Sums over images in float64, in one thread, so that any number of processes gives the same bits.

    count: images. total: (C, H, W), of pixels in [-1, 1]. squares: (C, H, W), of orthonormal DCT-II coefficients.
    products: (K, K), of the K = C LOW_MODES^2 lowest coefficients.
    """

    count: int = 0
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(()))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(()))
    products: NDArray[np.float64] = field(default_factory=lambda: np.zeros(()))

    def add(self, images: Sequence[NDArray[np.uint8]]) -> None:
        """Add images, each (H, W, C) of the same shape."""
        step = max(1, BATCH_BYTES // (8 * images[0].size)) if images else 1
        for start in range(0, len(images), step):
            x = np.stack(images[start : start + step]).transpose(0, 3, 1, 2) / 127.5 - 1
            u = dctn(x, axes=(2, 3), norm="ortho")
            low = u[..., :LOW_MODES, :LOW_MODES].reshape(len(u), -1)
            # einsum, because a matrix product's rounding may depend on the number of BLAS threads
            self.merge(Statistics(len(x), x.sum(0), (u**2).sum(0), np.einsum("ni,nj->ij", low, low)))

    def merge(self, other: Statistics) -> None:
        """Add the sums of other images of the same shape."""
        self.count += other.count
        self.total = self.total + other.total
        self.squares = self.squares + other.squares
        self.products = self.products + other.products

    def info(self, num_classes: int) -> DataInfo:
        """The data set's statistics; `write_manifest` sets the fingerprint."""
        channels, height, width = self.total.shape
        mean_image = self.total / self.count
        channel_mean = mean_image.mean((1, 2))
        # a channel's mean enters the DC coefficient only: E[(u - sqrt(HW) m)^2] = E[u^2] - HW m^2
        power = self.squares / self.count
        power[:, 0, 0] = np.maximum(power[:, 0, 0] - height * width * channel_mean**2, 0)
        spectrum = power.mean(0)
        mean = dctn(mean_image, axes=(1, 2), norm="ortho")[:, :LOW_MODES, :LOW_MODES]
        low_covariance = self.products / self.count - np.outer(mean, mean)
        low_mean = mean.copy()
        low_mean[:, 0, 0] = 0  # the DC coefficient is the channel mean
        return DataInfo(
            resolution=height,
            channels=channels,
            num_classes=num_classes,
            num_images=self.count,
            channel_mean=channel_mean,
            mean_image=mean_image,
            power_spectrum=spectrum,
            sigma_data=math.sqrt(spectrum.mean()),
            low_mean=low_mean.ravel(),
            low_covariance=low_covariance,
            fingerprint="",
        )
