"""Pictures: exact pixels of a grid, whole files, readable curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from warm_dist.errors import OutputError, printable
from warm_dist.figures import new_figure, save_figure, save_grid, save_table
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


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", [r"$\frac{x$", r"$x$ \$", "a\udcffb", "a\x1b[2J\nb", "猫🐈"])
def test_names_of_people_are_no_markup(tmp_path: Path, name: str) -> None:
    """Fault: a folder called `$\\frac{x$` ends evaluate.py, another is shown as a formula."""
    save_table([(name, np.zeros((1, 1, 8, 8), np.uint8))], [name], name, tmp_path / "table.png")
    figure = new_figure()
    axes = figure.add_subplot(title=name)
    axes.loglog([1e-3, 1e3], [1e-3, 1e3], label=name)
    axes.set_xticks([0.1, 10], [printable(name)] * 2)
    axes.legend()
    save_figure(figure, tmp_path / "axes.png")
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert not [text for text in texts if text.get_parse_math()]
    assert {"1e−01", "1", "100"} < {label.get_text() for label in axes.get_yticklabels()}


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
