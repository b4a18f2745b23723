"""KID against its formula and clean-fid; precision and recall against brute force and sets with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from warm_dist.evaluation import kid_precision_recall
from warm_dist.evaluation.kid_precision_recall import kid, precision_recall


def rows(n: int, dim: int, seed: int, shift: float = 0.0) -> NDArray[np.float32]:
    """Rows like features: not negative, non-zero means."""
    return np.maximum(np.random.default_rng(seed).standard_normal((n, dim)) + 0.5 + shift, 0).astype(np.float32)


def direct_mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The unbiased estimate, term by term (arXiv 1801.01401, eq. 4)."""

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3)

    m, n = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


@pytest.mark.parametrize("block", [5, 1024], ids=["blocks", "one block"])
@pytest.mark.parametrize("num_real", [12, 17])
def test_kid_is_the_formula(num_real: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kid_precision_recall, "_BLOCK", block)
    x, y = rows(12, 5, 0), rows(num_real, 5, 1, shift=0.3)
    expected = direct_mmd(x.astype(float), y.astype(float))
    assert kid(x, y) == pytest.approx(expected, rel=1e-12)
    assert kid(y, x) == pytest.approx(expected, rel=1e-12)


def test_kid_is_clean_fids_with_one_subset_of_all_rows() -> None:
    from cleanfid.fid import kernel_distance

    fake, real = rows(1500, 64, 0).astype(float), rows(1500, 64, 1, shift=0.1).astype(float)
    assert kid(fake, real) == pytest.approx(kernel_distance(real, fake, num_subsets=1, max_subset_size=1500), rel=1e-9)


def test_kid_is_unbiased() -> None:
    values = [kid(rows(60, 16, 2 * i), rows(45, 16, 2 * i + 1)) for i in range(100)]
    error = np.std(values) / 10
    assert abs(np.mean(values)) < 4 * error  # a biased estimate, with the diagonal, is off by 40 of these
    assert min(values) < 0 < max(values)


def brute_force(fake: NDArray[np.float64], real: NDArray[np.float64], k: int) -> tuple[float, float]:
    """Eq. 1 and 2 of arXiv 1904.06991, image by image."""

    def inside(point: NDArray[np.float64], members: NDArray[np.float64]) -> bool:
        for i, member in enumerate(members):
            fellows = sorted(float(np.linalg.norm(member - other)) for j, other in enumerate(members) if j != i)
            if np.linalg.norm(point - member) <= fellows[k - 1]:
                return True
        return False

    return np.mean([inside(x, real) for x in fake]).item(), np.mean([inside(y, fake) for y in real]).item()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [16, 1024], ids=["blocks", "one block"])
def test_precision_and_recall_are_brute_force(k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kid_precision_recall, "_BLOCK", block)
    fake, real = rows(50, 6, 0, shift=0.2), rows(41, 6, 1)
    expected = brute_force(fake.astype(float), real.astype(float), k)
    assert precision_recall(fake, real, k) == pytest.approx(expected, abs=1e-12)
    assert min(expected) > 0.1
    assert max(expected) < 1


def test_equal_sets_and_far_ones() -> None:
    """Fault: each set is centred by its own mean, so that sets that lie far apart look equal."""
    x = rows(200, 32, 0)
    assert precision_recall(x, x.copy()) == (1, 1)
    assert precision_recall(x, x[::-1]) == (1, 1)
    assert precision_recall(x + 100, x) == (0, 0)


def test_a_generator_of_one_mode_of_four_is_precise_and_recalls_a_quarter() -> None:
    centres = 50 * np.eye(4, 8)
    draw = np.random.default_rng(0)
    real = np.concatenate([centre + draw.standard_normal((100, 8)) for centre in centres])
    assert precision_recall(real[200:300], real) == (1, 0.25)
    narrow = centres[2] + 0.5 * draw.standard_normal((400, 8))
    precision, recall = precision_recall(narrow, real)
    assert precision > 0.99
    assert 0 < recall < 0.25


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_duplicates_are_at_no_distance(dtype: type) -> None:
    """Radii of 0: only an exact copy lies inside, whatever the block that it is met in.

    Fault: |x|² - 2 x·y + |y|² of equal rows is rounded to slightly more or less than 0.
    """
    draw = np.random.default_rng(0)
    real = np.repeat(draw.standard_normal((40, 512)) + 5, 4, axis=0).astype(dtype)  # three fellows each at distance 0
    fake = np.concatenate([real[::4], real[::4] + dtype(1e-3)])
    assert precision_recall(fake, real) == (0.5, 1)
    assert precision_recall(real + dtype(1e-3), real) == (0, 0)


def test_sets_that_cannot_be_compared() -> None:
    """Fault: too few rows, or rows of different widths, give a number or an error of numpy."""
    x = rows(4, 8, 0)
    assert precision_recall(x, x, k=3) == (1, 1)
    for bad in (x[:3], x[:, :7], x[0]):
        with pytest.raises(ValueError, match="N and M at least 4"):
            precision_recall(x, bad, k=3)
    for bad in (x[:1], x[:, :7], x[0]):
        with pytest.raises(ValueError, match="N and M at least 2"):
            kid(bad, x)
