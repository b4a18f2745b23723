"""Pictures: exact pixels of a grid, whole files, readable curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from warm_dist.errors import OutputError
from warm_dist.figures import save_grid
from warm_dist.tracking.curve import loss_curve


def test_every_pixel_of_every_image_is_in_the_grid(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6), dtype=np.uint8)
    save_grid(images, tmp_path / "grid.png", columns=3, scale=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * (8 + 2) + 2, 3 * (12 + 2) + 2, 3)
    for k, image in enumerate(images):
        y, x = 2 + k // 3 * 10, 2 + k % 3 * 14
        assert np.array_equal(grid[y : y + 8 : 2, x : x + 12 : 2], image.transpose(1, 2, 0))
        assert np.array_equal(grid[y + 1 : y + 8 : 2, x + 1 : x + 12 : 2], image.transpose(1, 2, 0))
    assert len(np.unique(grid[12:, 30:])) == 1, "the sixth place is empty"


@pytest.mark.parametrize("resolution", [8, 16, 64])
def test_small_images_become_a_picture_of_512_px(tmp_path: Path, resolution: int) -> None:
    save_grid(np.zeros((64, 1, resolution, resolution), np.uint8), tmp_path / "new" / "grid.png", columns=8)
    width, height = Image.open(tmp_path / "new" / "grid.png").size
    assert width == height == 512 + 9 * 2
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"], "no temporary file stays"


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"float32 \(1, 3, 8, 8\)"):
        save_grid(np.zeros((1, 3, 8, 8), np.float32), tmp_path / "grid.png", columns=1)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_grid(np.zeros((1, 3, 8, 8), np.uint8), tmp_path / "file" / "grid.png", columns=1)


def test_curves_show_both_heads_and_the_distance(tmp_path: Path) -> None:
    lines = [
        {"nimg": n, "kind": "train", "loss": 3 / n, "loss_blurry": 2 / n, "loss_residual": 1 / n}
        for n in range(100, 1000, 50)
    ]
    lines += [{"nimg": n, "kind": "eval", "frechet": 400 - n / 3, "floor": 14.0} for n in (0, 500, 1000)]
    loss_curve(lines, tmp_path / "with.png")
    loss_curve(lines[:-3], tmp_path / "without.png")
    loss_curve([], tmp_path / "empty.png")
    colours = {tuple(c) for c in np.asarray(Image.open(tmp_path / "with.png").convert("RGB")).reshape(-1, 3)}
    green, orange = (44, 160, 44), (255, 127, 14)
    assert green in colours
    assert orange in colours
    plain = {tuple(c) for c in np.asarray(Image.open(tmp_path / "without.png").convert("RGB")).reshape(-1, 3)}
    assert green not in plain
