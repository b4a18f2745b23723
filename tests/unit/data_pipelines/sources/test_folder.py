"""A folder of pictures: order, labels, and what does not decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.sources.base import BadImage
from data_pipelines.sources.open import open_source
from tests.support.pictures import encode, good, noise


def test_folder_sorted_with_class_folders_as_labels(tree: Path) -> None:
    source = open_source(str(tree), 8)
    assert source.class_names == ("ant", "zebra")
    assert [(item.key, item.label) for item in good(source)] == [
        ("ant/x.png", 0),
        ("ant/y.png", 0),
        ("zebra/a.png", 1),
        ("zebra/b.png", 1),
    ]
    assert np.array_equal(good(source)[0].image, noise(3))
    assert np.array_equal(good(source)[0].image, good(source)[0].image)  # iterable again


def test_an_image_beside_the_class_folders_means_no_classes(tree: Path) -> None:
    (tree / "top.png").write_bytes(encode(noise(9)))
    source = open_source(str(tree), 8)
    assert source.num_classes == 0
    assert {item.label for item in good(source)} == {-1}
    assert len(source) == 5


def test_what_does_not_decode_comes_out_as_a_bad_image(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(noise(0, 64, 64))
    (tree / "ant" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tree / "ant" / "empty.png").write_bytes(b"")
    (tree / "ant" / "text.png").write_text("hello")
    (tree / "ant" / "deep.png").write_bytes(encode(np.zeros((8, 8), np.uint16)))
    source = open_source(str(tree), 8)
    bad = [item for item in source if isinstance(item, BadImage)]
    assert [item.key for item in bad] == ["ant/cut.png", "ant/deep.png", "ant/empty.png", "ant/text.png"]
    assert all(item.reason for item in bad)
    assert "8 bits" in bad[1].reason
    assert len(good(source)) == 4
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    bombs = [item for item in source if isinstance(item, BadImage)]
    assert any("bomb" in item.reason for item in bombs)


def test_hidden_files_and_links_to_folders_are_no_pictures(tree: Path) -> None:
    (tree / "ant" / "._x.png").write_bytes(b"what the Finder leaves")
    (tree / "ant" / "loop").symlink_to(tree)
    (tree / "ant" / "link.png").symlink_to(tree / "ant" / "x.png")
    source = open_source(str(tree), 8)
    assert [item.key for item in good(source)] == [
        "ant/link.png",
        "ant/x.png",
        "ant/y.png",
        "zebra/a.png",
        "zebra/b.png",
    ]
    assert len(source) == 5
