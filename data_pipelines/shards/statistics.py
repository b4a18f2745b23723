"""The statistics of a data set: streaming sums that add up, shard by shard, to a manifest's `DataInfo`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

from warm_dist.data import LOW_MODES, DataInfo

BATCH_BYTES = 16 << 20  # of float64 pixels


class Statistics:
    """Sums in float64, by one thread: the same images give the same bits however many processes pack them.

    count: images. total: (C, H, W), of pixels in [-1, 1]. squares: (C, H, W), of orthonormal DCT-II coefficients.
    products: (K, K), of the K = C LOW_MODES^2 lowest coefficients.
    """

    def __init__(
        self,
        count: int = 0,
        total: NDArray[np.float64] | None = None,
        squares: NDArray[np.float64] | None = None,
        products: NDArray[np.float64] | None = None,
    ) -> None:
        zero: NDArray[np.float64] = np.zeros(())
        self.count = count
        self.total = zero if total is None else total
        self.squares = zero if squares is None else squares
        self.products = zero if products is None else products

    def add(self, images: Sequence[NDArray[np.uint8]]) -> None:
        """images: (H, W, C) each, all of one shape."""
        step = max(1, BATCH_BYTES // (8 * images[0].size)) if images else 1
        for start in range(0, len(images), step):
            x = np.stack(images[start : start + step]).transpose(0, 3, 1, 2) / 127.5 - 1
            u = dctn(x, axes=(2, 3), norm="ortho")
            low = u[..., :LOW_MODES, :LOW_MODES].reshape(len(u), -1)
            # einsum, since a matrix product's rounding may depend on the number of BLAS threads
            self.merge(Statistics(len(x), x.sum(0), (u**2).sum(0), np.einsum("ni,nj->ij", low, low)))

    def merge(self, other: Statistics) -> None:
        """Take in the sums of other images of the same shape."""
        self.count += other.count
        self.total = self.total + other.total
        self.squares = self.squares + other.squares
        self.products = self.products + other.products

    def info(self, num_classes: int) -> DataInfo:
        """Everything but the fingerprint, which the written manifest has."""
        channels, height, width = self.total.shape
        mean_image = self.total / self.count
        channel_mean = mean_image.mean((1, 2))
        # the mean of a channel enters one coefficient only, the DC: E[(u - sqrt(HW) m)^2] = E[u^2] - HW m^2
        power = self.squares / self.count
        power[:, 0, 0] = np.maximum(power[:, 0, 0] - height * width * channel_mean**2, 0)
        spectrum = power.mean(0)
        mean = dctn(mean_image, axes=(1, 2), norm="ortho")[:, :LOW_MODES, :LOW_MODES]
        low_covariance = self.products / self.count - np.outer(mean, mean)
        low_mean = mean.copy()
        low_mean[:, 0, 0] = 0  # the channel mean is the DC, and nothing else
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
