"""Inception's real architecture against clean-fid's own features, in float32 and bf16; slow by its size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from launch.benchmarks.features import pictures, random_inception
from warm_dist.evaluation.extractors import make_extractor
from warm_dist.evaluation.feature_stream import features
from warm_dist.evaluation.frechet import Moments, frechet_distance
from warm_dist.files import file_sha256


def clean_fid(folder: Path, images: NDArray[np.uint8] | torch.Tensor) -> NDArray[np.float32]:
    """Features by clean-fid's own resize, layout, batch and network, from `inception-2015-12-05.pt` in this folder."""
    from launch.benchmarks.peers.clean_fid import CleanFid

    return CleanFid(folder)(torch.as_tensor(images))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception(tmp_path_factory.mktemp("weights"))


def test_the_real_architecture_gives_clean_fids_features(inception: Path) -> None:
    images = pictures(100, 132)
    extractor = make_extractor("inception", str(inception), file_sha256(inception))
    assert (extractor.name, extractor.num_features, extractor.sha256) == ("inception", 2048, file_sha256(inception))
    ours, theirs = features(extractor, images, 16), clean_fid(inception.parent, images)
    assert np.abs(ours - theirs).max() < 1e-5
    assert theirs.std(axis=0).mean() > 0.1, "features that are all alike would agree as well"


def test_inception_in_bf16_is_close_and_not_called_fid(inception: Path) -> None:
    """Also that no precision leaks: float32 is the same before, after, and inside the caller's autocast."""
    images, source = pictures(100, 116), (str(inception), file_sha256(inception))
    exact, rough = make_extractor("inception", *source), make_extractor("inception", *source, bf16=True)
    assert rough.name == "inception-bf16"
    before = features(exact, images, 16)
    out = features(rough, images, 16)
    assert out.dtype == np.float32
    assert 1e-4 < np.sqrt(((out - before) ** 2).mean()) < 0.2 * before.std(axis=0).mean()
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(features(exact, images, 16), before)
    distance = [frechet_distance(Moments.of(rows[:8]), Moments.of(rows[8:])) for rows in (before, out)]
    assert distance[1] == pytest.approx(distance[0], rel=0.02)


def pooled(n: int, seed: int, dim: int = 2048) -> NDArray[np.float32]:
    """Rows like Inception's: not negative, means of 0.4, eigenvalues from 1e-3 to 5 (one mixture for all seeds)."""
    mix = np.random.default_rng(99).standard_normal((dim, dim)) * 3 / np.sqrt(dim)
    z = np.random.default_rng(seed).standard_normal((n, dim)) * np.exp(-np.arange(dim) / 300)
    return np.maximum(0.4 + z @ mix, 0).astype(np.float32)


@pytest.mark.parametrize("n", [4096, 1000], ids=["full rank", "fewer images than features"])
def test_at_inceptions_size_it_is_exact_too(n: int) -> None:
    """Fault: square roots of a singular covariance's rounded zero eigenvalues, a thousand of which add up."""
    a, b = Moments.of(pooled(n, 1)), Moments.of(pooled(n, 2))
    distance = frechet_distance(a, b)
    assert distance > 1
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
    assert abs(frechet_distance(a, a)) < 1e-6
