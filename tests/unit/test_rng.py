"""Random numbers derived from seed, purpose and index."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from warm_dist import rng


def test_an_index_draws_the_same_wherever_it_stands():
    whole = rng.normals(0, "noise", range(10), (3, 4))
    np.testing.assert_array_equal(rng.normals(0, "noise", [7, 2], (3, 4)), whole[[7, 2]])
    np.testing.assert_array_equal(rng.uniforms(0, "augment", [5], 2)[0], rng.uniforms(0, "augment", range(10), 2)[5])


def test_seeds_purposes_and_indices_differ():
    draws = [
        rng.generator(*key).random() for key in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 2**70)]
    ]
    assert len(set(draws)) == 5


def test_golden_numbers():
    """Fault: another key or counter, with which no earlier run or evaluation can be repeated."""
    # python -c "from warm_dist import rng; print(rng.generator(0, 'noise', 1).random(2).tolist())"
    golden = rng.generator(0, "noise", 1).random(2).tolist()
    assert golden == GOLDEN


def test_each_generator_of_many_is_that_of_its_index():
    """Fault: an index begins with what the one before left over: half a word, a part of a block, a higher counter."""
    indices = [0, 3, 2**53 + 1, 2**64 + 7, 3]
    key = np.frombuffer(hashlib.blake2b(b"5/many", digest_size=16).digest(), np.uint64)
    for index, draw in zip(indices, rng.generators(5, "many", indices), strict=True):
        philox = np.random.Philox(key=key, counter=[0, index % 2**64, index // 2**64, 0])
        assert str(draw.bit_generator.state) == str(philox.state)
        assert (
            draw.integers(9, size=3, dtype=np.uint32).tolist()
            == np.random.Generator(philox).integers(9, size=3, dtype=np.uint32).tolist()
        )


def test_two_who_draw_for_the_same_purpose_do_not_disturb_each_other():
    """Fault: one generator for all threads: those that draw ahead of a step, and evaluation."""
    one, other = rng.generators(0, "noise", [1]), rng.generators(0, "noise", [2])
    draw, _ = next(one), next(other)
    assert draw.random(2).tolist() == GOLDEN


def test_normals_are_normal():
    values = rng.normals(3, "noise", range(100), (200,)).ravel()
    assert abs(values.mean()) < 0.03  # 4 standard errors
    assert abs(values.std() - 1) < 0.02
    assert abs(np.corrcoef(values[:-200], values[200:])[0, 1]) < 0.03


def test_dropout_seed_depends_on_nimg_and_rank():
    draws = []
    for nimg, rank in ((0, 0), (32, 0), (0, 1), (0, 0)):
        rng.seed_torch(0, nimg, rank)
        draws.append(float(torch.rand(1)))
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3


GOLDEN = [0.9374585660149543, 0.2577047712938145]
