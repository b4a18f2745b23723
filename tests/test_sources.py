"""Where images come from: counts, order, labels, and pixels that a direct computation confirms."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.sources import base
from data_pipelines.sources.base import BadImage, Sample, Source
from data_pipelines.sources.open import open_source
from warm_dist.errors import ConfigError, DataError


def encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def good(source: Source) -> list[Sample]:
    return [item for item in source if isinstance(item, Sample)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two class folders with two images each, written in an order that is not the sorted one."""
    for number, name in enumerate(("zebra/b.png", "zebra/a.png", "ant/y.png", "ant/x.png")):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(encode(noise(number)))
    (tmp_path / "tree" / "zebra" / "notes.txt").write_text("no image")
    return tmp_path / "tree"


def test_openmoji_without_skin_tones() -> None:
    source = open_source("openmoji", 16)
    assert len(source) == 2460
    assert source.num_classes == 0
    assert "CC BY-SA 4.0" in source.attribution
    first = next(iter(source))
    assert isinstance(first, Sample)
    assert first.image.shape == (16, 16, 3)
    assert (first.image[0, 0] == 255).all()  # white paper
    with pytest.raises(ConfigError, match="24 does not divide 64"):
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


def test_zip_equals_folder_with_or_without_a_wrapping_folder(tree: Path, tmp_path: Path) -> None:
    for prefix in ("", "wrapped/"):
        with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
            for path in tree.rglob("*.*"):
                archive.write(path, prefix + path.relative_to(tree).as_posix())
            archive.writestr("__MACOSX/._x.png", b"")
        zipped = open_source(str(tmp_path / "tree.zip"), 8)
        folder = open_source(str(tree), 8)
        assert zipped.class_names == folder.class_names
        assert [prefix + item.key for item in good(folder)] == [item.key for item in good(zipped)]
        assert all(np.array_equal(a.image, b.image) for a, b in zip(good(folder), good(zipped), strict=True))


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


def test_shuffled_is_the_same_samples_in_an_order_that_never_changes(tree: Path) -> None:
    for number in range(50):
        (tree / "ant" / f"{number:02d}.png").write_bytes(encode(noise(number)))
    plain, mixed = open_source(str(tree), 8), open_source(str(tree), 8, shuffle=True)
    keys = [item.key for item in good(mixed)]
    assert sorted(keys) == [item.key for item in good(plain)]
    assert keys != sorted(keys)
    assert keys == [item.key for item in good(open_source(str(tree), 8, shuffle=True))]
    images = {item.key: item.image for item in good(plain)}
    assert all(np.array_equal(item.image, images[item.key]) for item in good(mixed))
    assert plain.identity != mixed.identity


def test_any_part_of_a_source_travels_to_another_process(tree: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for path in tree.rglob("*.png"):
            archive.write(path, path.relative_to(tree).as_posix())
    for spec in (str(tree), str(tmp_path / "tree.zip"), "digits", "openmoji"):
        source = open_source(spec, 8)
        part = list(pickle.loads(pickle.dumps(source.part(1, 3))))
        assert [item.key for item in part] == [item.key for _, item in zip(range(3), source, strict=False)][1:]


def test_identity_changes_with_what_the_bytes_depend_on(tree: Path) -> None:
    seen = {open_source(str(tree), size, resize).identity for size in (4, 8) for resize in ("box", "lanczos", "adm")}
    (tree / "ant" / "z.png").write_bytes(encode(noise(7)))
    seen.add(open_source(str(tree), 8).identity)
    (tree / "ant" / "z.png").write_bytes(encode(noise(7, 9, 9)))
    seen.add(open_source(str(tree), 8).identity)
    assert len(seen) == 8
    assert open_source(str(tree), 8).identity == open_source(str(tree), 8).identity


def test_files_that_no_picture_needs_are_bad_images(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(5000))
        archive.writestr("b.png", encode(noise(0)))
    (tree / "ant" / "x.png").write_bytes(bytes(5000))
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 4000)
    for spec, name in ((tmp_path / "bomb.zip", "a.png"), (tree, "ant/x.png")):
        bad = [item for item in open_source(str(spec), 8) if isinstance(item, BadImage)]
        assert [item.key for item in bad] == [name]
        assert "5000 bytes, pictures have 4000 at most" in bad[0].reason


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


def test_unknown_sources_and_broken_archives(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such source"):
        open_source(str(tmp_path / "nowhere"), 8)
    for resolution, resize in ((0, "box"), (8, "cubic")):
        with pytest.raises(ConfigError, match=f"resolution {resolution}, resize '{resize}'"):
            open_source(str(tmp_path), resolution, resize)
    for name, words in (
        ("a.zip", "not a readable zip"),
        ("a.parquet", "not readable as Parquet"),
        ("a.tar", "not a readable tar"),
        ("a.tar.gz", "not a readable compressed tar"),
    ):
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(DataError, match=words):
            open_source(str(tmp_path / name), 8)
