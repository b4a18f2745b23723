"""A rank's step made ready: which images are mirrored, which lose their class, and what each draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch

from tests.support.tiny_run import config, info
from warm_dist import rng
from warm_dist.data import Batch
from warm_dist.training.inputs import Prepared, prepare

CPU = torch.device("cpu")


def prepared(tmp_path, positions: np.ndarray, bnr: object = 0.5, **train) -> Prepared:
    """Image p is 255 at row p mod 8, column p mod 3, else 0, and of class p mod 4."""
    images = np.zeros((len(positions), 3, 8, 8), np.uint8)
    images[np.arange(len(positions)), :, positions % 8, positions % 3] = 255
    changes = {f"train__{key}": value for key, value in train.items()}
    settings = config(tmp_path, data__num_classes=4, process__bnr=bnr, **{"train__horizontal_flips": False, **changes})
    batch = Batch(images, positions % 4, positions, tuple(map(str, positions)))
    return prepare(batch, settings, info(), CPU)


def test_half_of_the_images_are_mirrored_from_left_to_right(tmp_path):
    positions = np.arange(400)
    rows, columns = (found.numpy() for found in torch.nonzero(prepared(tmp_path, positions).x0[:, 0] > 0).T[1:])
    assert np.array_equal(rows, positions % 8)
    assert np.array_equal(columns, positions % 3)
    bright = prepared(tmp_path, positions, horizontal_flips=True).x0[:, 0] > 0
    rows, columns = (found.numpy() for found in torch.nonzero(bright).T[1:])
    assert np.array_equal(rows, positions % 8), "never upside down"
    mirrored = columns == 7 - positions % 3
    assert np.array_equal(columns[~mirrored], positions[~mirrored] % 3)
    assert abs(mirrored.mean() - 0.5) < 0.1  # 4 standard errors


def test_a_share_of_the_images_loses_its_class_whether_mirrored_or_not(tmp_path):
    positions = np.arange(2000)
    data = prepared(tmp_path, positions, horizontal_flips=True, label_dropout=0.3)
    (labels,) = data.condition
    lost = labels.numpy() == -1
    assert np.array_equal(labels.numpy()[~lost], positions[~lost] % 4)
    mirrored = torch.nonzero(data.x0[:, 0] > 0)[:, 2].numpy() > 3
    for part in (mirrored, ~mirrored):
        assert abs(lost[part].mean() - 0.3) < 0.06  # 4 standard errors


@pytest.mark.parametrize("field", ["noise", "level", "condition", "x0"])
def test_an_image_draws_by_its_position_whatever_comes_with_it(tmp_path, field):
    options = {"horizontal_flips": True, "label_dropout": 0.5, "augment": 0.5}
    whole, part = prepared(tmp_path, np.arange(40), **options), prepared(tmp_path, np.array([31, 7]), **options)
    a, b = (getattr(data, field) for data in (whole, part))
    for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (a, b)), strict=True):
        torch.testing.assert_close(one[[31, 7]], other)


def test_whatever_is_drawn_has_a_stream_of_its_own_under_the_run_s_seed(tmp_path, monkeypatch):
    """Fault: the noise is also what chose its level, or a run with another seed draws the same."""
    asked, generators = [], rng.generators

    def watched(seed: int, purpose: str, indices: Iterable[int]) -> Iterator[np.random.Generator]:
        asked.append((seed, purpose, list(indices)))
        return generators(*asked[-1])

    monkeypatch.setattr(rng, "generators", watched)
    prepared(tmp_path, np.array([31, 7]), seed=5, horizontal_flips=True, label_dropout=0.5, augment=0.5)
    assert [(seed, indices) for seed, _, indices in asked] == [(5, [31, 7])] * 5
    assert len({purpose for _, purpose, _ in asked}) == 5, "flip and class, level, BNR, noise, augmentation"


def test_noise_is_white_of_unit_variance_and_tells_nothing_of_its_level(tmp_path):
    data = prepared(tmp_path, np.arange(2000))
    columns = torch.cat([data.noise.flatten(1), (data.level.sigma.log()[:, None].float() + 1.2) / 1.2], 1)
    assert float(columns.mean(0).abs().max()) < 0.1  # 4.5 standard errors
    covariance = columns.T @ columns / 2000
    torch.testing.assert_close(covariance, torch.eye(3 * 8 * 8 + 1), rtol=0, atol=0.15)  # 6.7, or 4.7 on the diagonal


def test_cold_training_blurs_up_to_half_the_images_width(tmp_path):
    alpha = prepared(tmp_path, np.arange(2000), {"kind": "cold"}).level.alpha
    assert (float(alpha.min()), float(alpha.max())) == (pytest.approx(0.1, rel=0.02), pytest.approx(8 / 2, rel=0.02))
    assert float(alpha.log().mean()) == pytest.approx((math.log(0.1) + math.log(4)) / 2, abs=0.1)  # 4 standard errors
