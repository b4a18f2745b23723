"""Images in whole batches over ranks, and their features as they come."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.tiny_run import ALONE
from warm_dist.distributed.world import World
from warm_dist.evaluation import frechet
from warm_dist.evaluation.extractors import Pixels
from warm_dist.evaluation.feature_stream import FeatureStream, batches_of, features

REAL = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)


@pytest.mark.parametrize("num_images", [1, 16, 17, 31, 33, 40])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_image_is_in_one_whole_batch_and_ranks_ask_equally_often(num_images: int, size: int) -> None:
    worlds = [World(rank, size, torch.device("cpu"), None) for rank in range(size)]
    dealt = [batches_of(world, num_images, 8) for world in worlds]
    numbers = sorted(number for mine, _ in dealt for batch in mine for number in batch)
    assert numbers == list(range(num_images))
    (most,) = {most for _, most in dealt}
    assert max(len(mine) for mine, _ in dealt) == most
    if num_images > 8 * (size - 1):  # a batch for every rank
        starts = sorted(batch.start for mine, _ in dealt for batch in mine)
        assert starts == list(range(0, num_images, 8)), "the same batches at any world size"


def test_batches_are_the_same_at_any_world_size_with_a_batch_for_every_rank() -> None:
    def dealt(size: int) -> list[range]:
        worlds = [World(rank, size, torch.device("cpu"), None) for rank in range(size)]
        return sorted((batch for world in worlds for batch in batches_of(world, 200, 64)[0]), key=lambda b: b.start)

    assert dealt(1) == dealt(2) == dealt(4) == [range(64), range(64, 128), range(128, 192), range(192, 200)]
    assert dealt(5) == [range(k, k + 40) for k in range(0, 200, 40)]


def test_streamed_features_are_those_of_all_images_at_once() -> None:
    parts = [np.arange(64) < 64, np.arange(64) % 3 == 0]
    kept = np.arange(64) % 2 == 1
    stream = FeatureStream(ALONE, Pixels(), parts, kept)
    for start in (32, 0, 48, 16):  # in any order
        stream.add(range(start, start + 16), REAL[start : start + 16])
    moments, rows = stream.result()
    whole = features(Pixels(), REAL, 64)
    assert np.array_equal(rows, whole[kept])
    for part, found in zip(parts, moments, strict=True):
        expected = frechet.Moments.of(whole[part])
        assert found.n == expected.n
        assert np.allclose(found.mean, expected.mean, rtol=1e-12)
        assert np.allclose(found.covariance, expected.covariance, rtol=1e-10, atol=1e-10)
