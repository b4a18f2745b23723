"""The data order, by its invariants."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest

from data_pipelines.lanes import Order, check_world, rank_positions
from warm_dist.errors import WorldSizeError


@pytest.mark.parametrize(
    ("shards", "lanes", "chunk", "window"),
    [
        ([100, 37, 1, 60], 8, 16, 32),
        ([97], 4, 10, 7),
        ([5, 3], 32, 4, 16),  # fewer images than lanes
        ([64, 64], 1, 1, 1),
        ([1], 2, 64, 1024),
    ],
)
def test_each_row_once_per_epoch_whether_or_not_n_divides(
    shards: list[int], lanes: int, chunk: int, window: int
) -> None:
    order = Order(shards, 7, lanes, chunk, window)
    n = sum(shards)
    stream = order.row_of(np.arange(5 * n))
    for epoch in range(5):
        part = stream[epoch * n : (epoch + 1) * n]
        assert np.array_equal(np.sort(part), np.arange(n))
        assert np.array_equal(part, order.rows(epoch))


def test_epochs_and_seeds_differ_and_the_order_is_a_pure_function() -> None:
    one, same, other = (Order([300, 211], seed, 8, 16, 64) for seed in (1, 1, 2))
    assert not np.array_equal(one.rows(0), one.rows(1))
    assert not np.array_equal(one.rows(0), other.rows(0))
    for epoch in (4, 0, 2):  # asked for in another sequence, beyond the cache
        assert np.array_equal(one.rows(epoch), same.rows(epoch))
    shuffled = np.random.default_rng(0).permutation(2000)
    assert np.array_equal(one.row_of(shuffled), same.row_of(np.arange(2000))[shuffled])


def test_a_lane_draws_its_windows_from_whole_chunks_one_after_another() -> None:
    chunk, window, lanes = 16, 64, 4
    order = Order([4096], 0, lanes, chunk, window)
    for epoch in (0, 1):
        rows = order.rows(epoch)
        for lane in range(lanes):
            for part in rows[lane::lanes].reshape(-1, window):
                chunks = np.unique(part // chunk)
                assert len(chunks) == window // chunk
                assert np.array_equal(np.sort(part), (chunks[:, None] * chunk + np.arange(chunk)).ravel())
                assert not np.array_equal(np.sort(part), part)


def test_positions_are_uniform_over_rows() -> None:
    """Over seeds, a row's mean position is that of a uniform one; a chunk that always came first would show."""
    mean = np.mean([np.argsort(Order([256], seed, 8, 8, 16).rows(0)) for seed in range(400)], axis=0)
    sigma = 256 / np.sqrt(12 * 400)
    assert np.abs(mean - 127.5).max() < 5 * sigma


def test_ranks_share_each_batch_by_lanes() -> None:
    for world in (1, 2, 4, 8):
        parts = [rank_positions(96, 32, 8, rank, world) for rank in range(world)]
        assert all(len(part) == 32 // world for part in parts)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(96, 128))
        for rank, part in enumerate(parts):
            assert np.array_equal(part, np.sort(part))
            assert set(part % 8) == set(range(rank * 8 // world, (rank + 1) * 8 // world))


def test_world_sizes_that_cannot_be_dealt() -> None:
    check_world(64, 32, 16)
    with pytest.raises(WorldSizeError, match=r"3 processes .* possible are 1, 2, 4, 8, 16, 32"):
        check_world(64, 32, 3)
    with pytest.raises(WorldSizeError, match=r"batch_size 48 is not a multiple of data\.num_lanes 32"):
        check_world(48, 32, 2)


def test_imagenet_size_in_well_under_a_second() -> None:
    order = Order([1024] * 1251, 0, 64, 64, 1024)
    started = time.perf_counter()
    rows = order.rows(0)
    assert time.perf_counter() - started < 2  # 0.2 s on one idle core; a python loop takes 10 s or more
    assert len(rows) == 1251 * 1024


def test_golden_order() -> None:
    """Checkpoints resume by position, so the order must never change. Made by this very expression."""
    rows = Order([100, 37, 1, 60], 7, 8, 16, 32).row_of(np.arange(600))
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] == "514f109331c2370a"
