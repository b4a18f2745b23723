"""Each image once an epoch, in one order, whatever reads it: any world, any threads, from anywhere."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.reading.lanes import rank_positions
from tests.support.ordered_digits import N, OrderedDigits
from tests.support.packed import Packed
from tests.support.reading import joined


@pytest.fixture(scope="module")
def data(digits: Packed) -> OrderedDigits:
    return OrderedDigits(digits)


@settings(max_examples=60, deadline=None)
@given(
    nimg=st.integers(0, 3 * N),
    world=st.sampled_from([1, 2, 4, 8]),
    threads=st.integers(1, 4),
    batch_size=st.sampled_from([8, 24, 32, 96, 256]),
    buffer_bytes=st.sampled_from([1, 50_000, 1 << 20]),
    draw=st.data(),
)
def test_any_rank_continues_anywhere(
    data: OrderedDigits, nimg: int, world: int, threads: int, batch_size: int, buffer_bytes: int, draw: st.DataObject
) -> None:
    rank = draw.draw(st.integers(0, world - 1))
    options = {"rank": rank, "world": world, "threads": threads, "batch_size": batch_size}
    with closing(data.loader(**options, buffer_bytes=buffer_bytes)) as reader:
        for number, batch in enumerate(islice(reader.batches(nimg), 4)):
            data.assert_right(batch, rank_positions(nimg + number * batch_size, batch_size, 8, rank, world))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_three_epochs_are_the_same_global_batches(data: OrderedDigits, world: int, threads: int) -> None:
    """Fault: a batch that spans two epochs depends on the number of ranks or threads."""
    count = 3 * N // 32 + 1
    ranks = []
    for rank in range(world):
        with closing(data.loader(rank=rank, world=world, threads=threads)) as reader:
            ranks.append(list(islice(reader.batches(0), count)))
    keys: list[str] = []
    for number, parts in enumerate(zip(*ranks, strict=True)):
        batch = joined(list(parts))
        data.assert_right(batch, np.arange(number * 32, number * 32 + 32))
        keys += batch.keys
    for epoch in range(3):
        assert len(set(keys[epoch * N : (epoch + 1) * N])) == N
