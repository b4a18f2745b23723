"""A rank's step made ready: which images are mirrored, which lose their class, and what each draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.tiny_run import config, info
from warm_dist.data import Batch
from warm_dist.training.inputs import Prepared, prepare

CPU = torch.device("cpu")


def prepared(tmp_path, positions: np.ndarray, **train) -> Prepared:
    """Image p is 255 at row p mod 8, column p mod 3, else 0, and of class p mod 4."""
    images = np.zeros((len(positions), 3, 8, 8), np.uint8)
    images[np.arange(len(positions)), :, positions % 8, positions % 3] = 255
    changes = {f"train__{key}": value for key, value in train.items()}
    settings = config(tmp_path, data__num_classes=4, **{"train__horizontal_flips": False, **changes})
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
