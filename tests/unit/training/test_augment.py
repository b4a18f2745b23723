"""Augmentation: what is drawn, how pictures move, and what training sees of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT
from warm_dist.config.run import load_config
from warm_dist.data import Batch, DataInfo
from warm_dist.training.augment import Draw, draw, low_pass, warp
from warm_dist.training.inputs import prepare

POSITIONS = range(4000)


def smooth(height: int = 32, width: int = 32, x: float = 0.0, y: float = 0.0, angle: float = 0.0, scale: float = 1.0):
    """A blob right of and below the centre, moved as an augmented picture would be; (1, 1, H, W)."""
    v, u = torch.meshgrid(torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij")
    u, v = u - x, v - y
    c, s = math.cos(angle), math.sin(angle)  # counter-clockwise as displayed: y points down
    u, v = (c * u - s * v) / scale, (s * u + c * v) / scale
    return torch.exp(-((u - 4) ** 2 / 18 + (v - 2) ** 2 / 8))[None, None]


def only(**changes: float) -> tuple[Draw, int]:
    """A drawn change of one kind alone, by search: labels other than the named stay 0."""
    drawn = draw(0, POSITIONS, 0.3, 32, 32)
    names = ["x_flip", "y_flip", "scale", "cos", "sin", "stretch_x", "stretch_y", "shift_x", "shift_y"]
    wanted = np.array([name in changes for name in names])
    k = next(k for k, row in enumerate(drawn.labels) if ((row != 0) == wanted).all())
    return Draw(drawn.labels[k : k + 1], drawn.matrix[k : k + 1]), k


def apply(drawn: Draw, image: torch.Tensor) -> torch.Tensor:
    return warp(image.float(), torch.from_numpy(drawn.matrix))


def test_without_augmentation_only_half_the_images_are_mirrored():
    drawn = draw(0, POSITIONS, 0.0, 8, 8)
    assert not drawn.labels[:, 1:].any()
    assert drawn.labels[:, 0].mean() == pytest.approx(0.5, abs=0.03)  # 4 standard errors
    images = torch.randn(len(POSITIONS), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mirrored = torch.from_numpy(drawn.labels[:, 0] > 0)[:, None, None, None]
    assert torch.equal(apply(drawn, images), torch.where(mirrored, images.flip(3), images))


def test_labels_have_edms_distributions():
    p = 0.25
    labels = draw(1, POSITIONS, p, 32, 32).labels.astype(np.float64)
    share = (labels != 0).mean(0)
    assert share == pytest.approx([0.5, p / 2, p, p, p, p, p / 2, p, p], abs=0.035)
    assert labels[labels[:, 2] != 0, 2].std() == pytest.approx(1, abs=0.1)
    angle = np.arctan2(labels[:, 4], labels[:, 3] + 1)[labels[:, 4] != 0]
    assert (angle.std(), np.abs(angle).max()) == (
        pytest.approx(math.pi / 3**0.5, abs=0.1),
        pytest.approx(math.pi, abs=0.05),
    )
    assert np.hypot(labels[:, 5], labels[:, 6])[labels[:, 5] != 0].std() == pytest.approx(0.6, abs=0.06)  # half-normal
    assert labels[labels[:, 7] != 0, 7:].std() == pytest.approx(1, abs=0.1)


def test_scale():
    """Fault: a picture shrinks where its label says that it grows, or is scaled about its corner."""
    drawn, _ = only(scale=1)
    size = 2 ** (0.2 * float(drawn.labels[0, 2]))
    torch.testing.assert_close(
        apply(drawn, smooth())[..., 6:-6, 6:-6], smooth(scale=size)[..., 6:-6, 6:-6], atol=0.01, rtol=0
    )


def test_rotation():
    """Fault: a picture turns the other way than its label says, since y points down."""
    drawn, _ = only(cos=1, sin=1)
    angle = math.atan2(drawn.labels[0, 4], drawn.labels[0, 3] + 1)
    torch.testing.assert_close(
        apply(drawn, smooth())[..., 6:-6, 6:-6], smooth(angle=angle)[..., 6:-6, 6:-6], atol=0.01, rtol=0
    )


def test_flips():
    """Fault: both turn the same axis, since a run without augmentation only mirrors."""
    image = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    for flips, axes in (({"x_flip": 1}, (3,)), ({"y_flip": 1}, (2,)), ({"x_flip": 1, "y_flip": 1}, (2, 3))):
        assert torch.equal(apply(only(**flips)[0], image), image.flip(axes))


def test_a_label_tells_all_of_the_change():
    """Fault: a stretch whose axis is drawn over a whole turn: two changes have one label; transforms in another order."""
    height, width = 24, 32
    drawn = draw(2, range(500), 0.7, height, width)
    for label, matrix in zip(drawn.labels.astype(np.float64), drawn.matrix, strict=True):
        x_flip, y_flip, log_scale, cos, sin, *along, right, down = label
        turn = np.array([[cos + 1, sin], [-sin, cos + 1]])  # counter-clockwise where y points down
        strength = math.copysign(
            math.hypot(*along), along[0]
        )  # an axis is drawn from half a turn: its cosine is positive
        axis = math.atan(along[1] / along[0]) if strength else 0.0
        c, s = math.cos(axis), math.sin(axis)
        onto = np.array([[c, -s], [s, c]])  # its rows: the axis, and across
        stretch = onto.T @ np.diag([2 ** (0.2 * strength), 2 ** (-0.2 * strength)]) @ onto
        forward = stretch @ turn * 2 ** (0.2 * log_scale) @ np.diag([1 - 2 * x_flip, 1 - 2 * y_flip])
        point = np.array([3.0, -2.0])
        moved = forward @ point + 0.125 * np.array([right * width, down * height])
        np.testing.assert_allclose(matrix @ [*moved, 1], [*point, 1], atol=2e-5)  # labels are float32


def test_no_part_of_a_change_depends_on_another():
    """Fault: one number is drawn for two parts, so that large pictures are always stretched."""
    labels = draw(3, POSITIONS, 1.0, 32, 32).labels.astype(np.float64)
    angle, axis = np.arctan2(labels[:, 4], labels[:, 3] + 1), np.arctan2(labels[:, 6], labels[:, 5]) % math.pi
    strength = np.copysign(np.hypot(labels[:, 5], labels[:, 6]), labels[:, 5])
    parts = np.stack([labels[:, 0], labels[:, 1], labels[:, 2], angle, axis, strength, labels[:, 7], labels[:, 8]])
    assert np.abs(np.corrcoef(parts) - np.eye(8)).max() < 0.07  # 4.5 standard errors
    some = (draw(4, POSITIONS, 0.5, 32, 32).labels != 0)[:, [0, 1, 2, 4, 5, 7]]
    assert np.abs(np.corrcoef(some.T) - np.eye(6)).max() < 0.07


def test_a_quarter_turn_is_rot90():
    turn = np.array([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])
    image = smooth()
    ours = apply(Draw(np.zeros((1, 9), np.float32), turn), image)
    torch.testing.assert_close(ours, torch.rot90(image, 1, (2, 3)), atol=0.01, rtol=0)


def test_translation():
    """Fault: a picture moves the other way than its label says, or another distance."""
    drawn, _ = only(shift_x=1, shift_y=1)
    x, y = 0.125 * 32 * drawn.labels[0, 7:]
    ours = apply(drawn, smooth())
    torch.testing.assert_close(ours[..., 8:-8, 8:-8], smooth(x=x, y=y)[..., 8:-8, 8:-8], atol=0.01, rtol=0)


def test_stretch_keeps_the_area_and_lies_along_its_axis():
    drawn, _ = only(stretch_x=1, stretch_y=1)
    weight = math.copysign(math.hypot(*drawn.labels[0, 5:7]), drawn.labels[0, 5])
    ratio = 2 ** (0.2 * weight)
    forward = np.linalg.inv(drawn.matrix[0])[:2, :2]
    assert np.linalg.det(forward) == pytest.approx(1)
    assert sorted(np.linalg.svd(forward)[1]) == pytest.approx(sorted([1 / ratio, ratio]))
    along = np.array([drawn.labels[0, 5], -drawn.labels[0, 6]])  # y points down
    np.testing.assert_allclose(forward @ along, along * ratio, rtol=1e-6)


def test_a_moved_picture_continues_as_its_mirror_image():
    picture = smooth(16, 24)
    right = np.array([[[1.0, 0, -24], [0, 1, 0], [0, 0, 1]]])  # by its whole width
    ours = apply(Draw(np.zeros((1, 9), np.float32), right), picture)
    torch.testing.assert_close(ours, picture.flip(3), atol=0.01, rtol=0)
    constant = torch.full((1, 3, 16, 24), 0.7)
    drawn = draw(0, range(50), 0.9, 16, 24)
    torch.testing.assert_close(apply(drawn, constant.expand(50, -1, -1, -1)), constant.expand(50, -1, -1, -1))


def test_each_image_has_its_own_change_in_any_batch():
    images = torch.randn(6, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    whole, later = draw(3, range(6), 0.5, 16, 8), draw(3, range(4, 6), 0.5, 16, 8)
    assert np.array_equal(whole.labels[4:], later.labels)
    assert np.array_equal(whole.matrix[4:], later.matrix)
    torch.testing.assert_close(apply(whole, images)[4:], apply(later, images[4:]), rtol=0, atol=1e-6)
    assert not np.array_equal(whole.labels, draw(4, range(6), 0.5, 16, 8).labels)


def test_filter_is_a_symmetric_low_pass():
    taps = low_pass(torch.float64, torch.device("cpu"))
    torch.testing.assert_close(taps, taps.flip(0))
    assert float(taps.sum()) == pytest.approx(1)
    n = torch.arange(12).double()
    response = [abs(complex((taps * torch.exp(-1j * w * n)).sum())) for w in (0.25 * math.pi, 0.75 * math.pi)]
    assert response[0] > 0.9
    assert response[1] < 0.1


def test_training_sees_moved_images_and_tells_the_network_how():
    config = load_config(ROOT / "configs" / "quickstart.json", ["train.augment=0.9", "train.horizontal_flips=false"])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
    batch = Batch(images, np.full(6, -1), np.arange(6) + 100, ("",) * 6)
    mean = np.array([0.1, 0.2, 0.3])
    info = DataInfo(16, 3, 0, 6, mean, np.zeros((3, 16, 16)), np.ones((16, 16)), 1.0, np.zeros(0), np.zeros(0), "")
    ready = prepare(batch, config, info, torch.device("cpu"))
    expected = draw(config.train.seed, range(100, 106), 0.9, 16, 16)
    x0 = torch.from_numpy(images) / 127.5 - 1 - torch.tensor(mean)[:, None, None]
    torch.testing.assert_close(ready.x0, warp(x0.float(), torch.as_tensor(expected.matrix)), rtol=0, atol=1e-5)
    torch.testing.assert_close(ready.condition[1], torch.as_tensor(expected.labels), rtol=0, atol=0)
    assert ready.condition[1].abs().amax() > 0
    assert (ready.x0 - x0).abs().amax() > 0.1
