"""Fréchet distances: closed forms, independent implementations, moments that add up."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray

from warm_dist.evaluation.frechet import INCEPTION_SHA256, MEASURE, FidSpec, Moments, floor_parts, frechet_distance

SPEC = FidSpec("lite0", "ab" * 32, "bilinear", 2048, 5000, "cd" * 32, "heun 18 rho 7", 35, "half-life 44000", 0)


def whitened(n: int, dim: int, seed: int) -> NDArray[np.float64]:
    """Rows whose sample mean is 0 and whose unbiased sample covariance is the unit matrix, to rounding."""
    rows = np.random.default_rng(seed).standard_normal((n, dim))
    rows -= rows.mean(axis=0)
    return np.linalg.qr(rows)[0] * np.sqrt(n - 1)


def correlated(n: int, dim: int, seed: int) -> NDArray[np.float64]:
    """Rows like features: non-zero means, correlations, a decaying spectrum."""
    g = np.random.default_rng(seed)
    return (
        g.random(dim) + g.standard_normal((n, dim)) * np.exp(-np.arange(dim) / 60) @ g.standard_normal((dim, dim)) / 8
    )


def test_diagonal_gaussians_have_the_closed_form() -> None:
    dim, a, b = 24, np.linspace(0.1, 3, 24), np.linspace(2, 0.5, 24)
    shift = np.linspace(-1, 1, dim)
    x, y = whitened(100, dim, 0) * a, whitened(90, dim, 1) * b + shift
    expected = (shift**2).sum() + ((a - b) ** 2).sum()
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "dim"), [(200, 96), (40, 96)], ids=["full rank", "fewer images than features"])
def test_distance_from_itself_is_nothing_and_it_is_symmetric(n: int, dim: int) -> None:
    a, b = (Moments.of(correlated(n, dim, seed)) for seed in (0, 1))
    assert abs(frechet_distance(a, a)) < 1e-6
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 1


def test_a_set_of_fewer_images_than_features_against_a_large_one() -> None:
    """The singular values of factors by eigenvectors are the slower oracle that squares nothing."""
    a, b = Moments.of(correlated(40, 96, 0)), Moments.of(correlated(500, 96, 1))
    factors = []
    for covariance in (a.covariance, b.covariance):
        values, vectors = np.linalg.eigh(covariance)
        real = values > 1e-12 * values[-1]
        factors.append(vectors[:, real] * np.sqrt(values[real]))
    cross = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_a_generator_that_makes_one_image_has_a_distance() -> None:
    """A has no covariance at all: what is left is |difference of means|^2 + tr(B)."""
    one, b = np.full((60, 24), 0.3), Moments.of(correlated(60, 24, 1))
    expected = ((0.3 - b.mean) ** 2).sum() + np.trace(b.covariance)
    assert frechet_distance(Moments.of(one), b) == pytest.approx(expected, rel=1e-6)  # covariance of rounding: 1e-17


def test_equals_clean_fid_and_scipys_square_root() -> None:
    from cleanfid.fid import frechet_distance as clean_fid  # scipy's sqrtm of A B

    x, y = correlated(1000, 256, 0), correlated(900, 256, 1)
    a, b = Moments.of(x), Moments.of(y)
    assert np.allclose(a.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clean-fid's sqrtm(disp=False)
        expected = clean_fid(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)  # sqrtm(A B) itself is good to 1e-7


@pytest.mark.parametrize("n", [300, 60], ids=["full rank", "fewer images than features"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_moments_of_parts_add_up(n: int, parts: int) -> None:
    rows, others = correlated(n, 96, 3).astype(np.float32), Moments.of(correlated(n, 96, 4))
    whole, ranks = Moments.of(rows), [Moments.zeros(96) for _ in range(parts)]
    for number in range(0, n, 10):  # batches dealt in turn
        ranks[number // 10 % parts].add(rows[number : number + 10])
    merged = Moments.from_flat(np.sum([rank.flat() for rank in ranks], axis=0))
    assert merged.n == n
    scale = np.abs(whole.covariance).max()
    assert np.allclose(merged.mean, whole.mean, rtol=0, atol=1e-10 * np.abs(whole.mean).max())
    assert np.allclose(merged.covariance, whole.covariance, rtol=0, atol=1e-10 * scale)
    assert frechet_distance(merged, others) == pytest.approx(frechet_distance(whole, others), rel=1e-10)
    assert frechet_distance(merged, whole) == pytest.approx(0, abs=1e-10 * np.trace(whole.covariance))


def test_moments_say_what_they_need() -> None:
    """Fault: one image, whose covariance is 0/0, has a distance of NaN, or `flat` leaves out a part of the moments."""
    rows = correlated(30, 8, 0)
    out = Moments.of(rows)
    back = Moments.from_flat(out.flat())
    assert out.flat().shape == (1 + 8 + 64,)
    assert out.flat().dtype == np.float64
    assert back.n == 30
    assert np.array_equal(back.total, out.total)
    assert np.array_equal(back.outer, out.outer)
    with pytest.raises(ValueError, match=r"rows: \(30, 7\), needs \(N, 8\)"):
        out.add(rows[:, :7])
    with pytest.raises(ValueError, match=r"70 numbers, needs 1 \+ D \+ D\^2"):
        Moments.from_flat(np.zeros(70))
    with pytest.raises(ValueError, match="needs 2"):
        frechet_distance(out, Moments.of(rows[:1]))
    with pytest.raises(ValueError, match="equal shapes"):
        frechet_distance(out, Moments.of(rows[:, :7]))


def test_floor_parts_are_disjoint_and_keyed_by_the_seed() -> None:
    a, b = floor_parts(501, n=2048, seed=0)
    assert (len(a), len(b)) == (250, 251)
    assert sorted([*a, *b]) == list(range(501))
    again = floor_parts(501, n=2048, seed=0)
    assert np.array_equal(a, again[0])
    assert np.array_equal(b, again[1])
    assert not np.array_equal(a, floor_parts(501, n=2048, seed=1)[0])
    # what these positions were when floors were first reported; other ones would make old floors another number
    small, others = floor_parts(10, n=3, seed=0)
    assert small.tolist() == [6, 9, 0]
    assert others.tolist()[:3] == [8, 4, 3]
    assert sorted([*small, *others]) == list(range(10))
    quickstart = floor_parts(2460, n=2048, seed=0)
    assert [len(part) for part in quickstart] == [1230, 1230]
    assert [hashlib.sha256(part.tobytes()).hexdigest()[:12] for part in quickstart] == ["407ae53020be", "a8db9ec9b006"]


def test_a_smaller_floor_has_a_larger_distance() -> None:
    """Fault: the floor is always that of two halves, whatever the number of generated images."""
    rows = correlated(500, 8, 4)
    large, small = (
        frechet_distance(*(Moments.of(rows[part]) for part in floor_parts(500, n, seed=0))) for n in (2048, 60)
    )
    assert small > large > 0, "fewer images lie further apart"


def test_a_perfect_model_gets_about_the_floor() -> None:
    """n images against many real ones: with halves of n each the floor would be 1.9 times the score."""
    n, num_real = 100, 2000
    floors, scores = [], []
    for seed in range(10):
        rows = np.random.default_rng(seed).standard_normal((num_real + n, 16))
        real, generated = Moments.of(rows[:num_real]), Moments.of(rows[num_real:])
        scores.append(frechet_distance(generated, real))
        floors.append(frechet_distance(*(Moments.of(rows[part]) for part in floor_parts(num_real, n, seed=0))))
    assert np.mean(floors) == pytest.approx(np.mean(scores), rel=0.15)  # the mean of ten is good to 5%


def test_a_spec_is_its_fields() -> None:
    """Fault: the hash leaves out a field, so that numbers of two settings are compared."""
    assert SPEC.hash == dataclasses.replace(SPEC).hash
    assert len(SPEC.hash) == len(SPEC.measure) == 12
    other = {f.name: ("x" if isinstance(getattr(SPEC, f.name), str) else 1) for f in dataclasses.fields(SPEC)}
    changed = {name: dataclasses.replace(SPEC, **{name: value}) for name, value in other.items()}
    assert len({spec.hash for spec in changed.values()} | {SPEC.hash}) == len(other) + 1, "every field counts"
    assert {name for name, spec in changed.items() if spec.measure != SPEC.measure} == set(MEASURE)
    assert len({spec.measure for spec in changed.values()}) == len(MEASURE) + 1


def test_only_inception_with_its_own_weights_in_float32_is_called_fid() -> None:
    def name(extractor: str, sha256: str = "0123456789abcdef" * 4) -> str:
        return dataclasses.replace(SPEC, extractor=extractor, extractor_sha256=sha256).name

    assert name("inception", INCEPTION_SHA256) == "FID"
    assert name("inception") == "Fréchet distance (inception 0123456789ab)"
    assert name("inception-bf16", INCEPTION_SHA256) == "Fréchet distance (inception-bf16 f58cb9b6ec32)"
    assert name("torchscript") == "Fréchet distance (torchscript 0123456789ab)"
    assert name("torchscript", INCEPTION_SHA256) == "Fréchet distance (torchscript f58cb9b6ec32)"
    assert [name("lite0"), name("pixels")] == ["Fréchet distance (lite0)", "Fréchet distance (pixels)"]
