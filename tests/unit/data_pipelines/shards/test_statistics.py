"""The statistics of a data set against a direct computation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from data_pipelines.pack import pack
from tests.support.packing import noise_source
from warm_dist.diffusion.spectrum import dct


@pytest.mark.parametrize(("channels", "payload"), [(3, "npy"), (1, "png")])
def test_statistics_equal_a_direct_computation(tmp_path: Path, channels: int, payload: str) -> None:
    """Fault: the channel means count as power, or a short last shard weighs as much as a whole one."""
    source = noise_source(50, channels=channels)
    info = pack(source, str(tmp_path), shard_size=16, payload=payload).info
    x = np.stack([item.image for item in source]).transpose(0, 3, 1, 2) / 127.5 - 1
    mean = x.mean((0, 2, 3))
    spectrum = (dctn(x - mean[:, None, None], axes=(2, 3), norm="ortho") ** 2).mean((0, 1))
    assert (info.resolution, info.channels, info.num_classes, info.num_images) == (8, channels, 3, 50)
    np.testing.assert_allclose(info.channel_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(info.mean_image, x.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(info.power_spectrum, spectrum, rtol=1e-10)
    low = dct(torch.from_numpy(x - mean[:, None, None]))[..., :4, :4].reshape(len(x), -1).numpy()
    np.testing.assert_allclose(info.low_mean, low.mean(0), atol=1e-12)
    np.testing.assert_allclose(info.low_covariance, np.cov(low.T, bias=True), atol=1e-11)
    assert info.sigma_data == pytest.approx(math.sqrt(spectrum.mean()), rel=1e-12)
