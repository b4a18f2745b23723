"""The data sets that come with packages."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.sources.base import Sample
from data_pipelines.sources.open import open_source
from tests.support.pictures import good
from warm_dist.errors import ConfigError


def test_openmoji_without_skin_tones() -> None:
    """Fault: skin tones count as images of their own, or transparent paper becomes black."""
    source = open_source("openmoji", 16)
    assert len(source) == 2460
    assert source.num_classes == 0
    assert "CC BY-SA 4.0" in source.attribution
    first = next(iter(source))
    assert isinstance(first, Sample)
    assert first.image.shape == (16, 16, 3)
    assert (first.image[0, 0] == 255).all()  # white paper
    with pytest.raises(ConfigError, match="24 must divide 64"):
        open_source("openmoji", 24)


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    small, large = good(open_source("digits", 8)), good(open_source("digits", 16))
    assert len(small) == 1797
    assert [sample.label for sample in small] == load_digits().target.tolist()
    exact = load_digits().images * (255 / 16)
    assert np.abs(np.stack([sample.image[..., 0] for sample in small]) - exact).max() <= 0.5
    assert np.array_equal(large[5].image[::2, 1::2], small[5].image)
    with pytest.raises(ConfigError, match="12 is not a multiple of 8"):
        open_source("digits", 12)
