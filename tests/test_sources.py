"""Where images come from: counts, order, labels, and pixels that a direct computation confirms."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.sources import BadImage, Sample, Source, decode_image, open_source
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


def test_parquet_in_hugging_face_layout_and_plain(tmp_path: Path) -> None:
    images, labels = [encode(noise(seed)) for seed in range(7)], [2, 0, 1, 2, 1, 0, 2]
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat", "dog", "emu"]}}}})}
    table = pa.table({"image": [{"bytes": data, "path": None} for data in images], "label": labels})
    (tmp_path / "parts").mkdir()
    pq.write_table(table[:3].replace_schema_metadata(metadata), tmp_path / "parts" / "0.parquet", row_group_size=2)
    pq.write_table(table[3:].replace_schema_metadata(metadata), tmp_path / "parts" / "1.parquet", row_group_size=2)
    struct = open_source(str(tmp_path / "parts"), 8)
    assert (len(struct), struct.class_names) == (7, ("cat", "dog", "emu"))
    assert [item.label for item in struct if isinstance(item, Sample)] == labels
    assert all(np.array_equal(item.image, noise(seed)) for seed, item in enumerate(good(struct)))
    pq.write_table(pa.table({"id": list(range(7)), "picture": images}), tmp_path / "plain.parquet")
    plain = open_source(str(tmp_path / "plain.parquet"), 8)
    assert {item.label for item in good(plain)} == {-1}
    assert np.array_equal(good(plain)[6].image, noise(6))
    pq.write_table(pa.table({"id": [1]}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no column of encoded images"):
        open_source(str(tmp_path / "none.parquet"), 8)


def test_pixels_are_cropped_to_the_center_and_box_averaged() -> None:
    pixels = noise(1, height=16, width=24)
    expected = pixels[:, 4:20].reshape(8, 2, 8, 2, 3).mean((1, 3))
    # PIL rounds each of its two passes
    assert np.abs(decode_image(encode(pixels), 8) - expected).max() <= 1


def test_transparency_is_laid_on_white_and_grey_becomes_rgb() -> None:
    transparent = np.zeros((8, 8, 4), np.uint8)
    transparent[:4] = (10, 20, 30, 255)
    image = decode_image(encode(transparent), 8)
    assert (image[:4] == (10, 20, 30)).all()
    assert (image[4:] == 255).all()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(decode_image(encode(grey), 8), np.repeat(grey[..., None], 3, axis=2))


def test_exif_orientation_is_applied() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = decode_image(encode(pixels, "JPEG", exif=exif.tobytes(), quality=95), 16)
    assert image[12].mean() > 200 > 50 > image[3].mean()


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


def test_unknown_sources_and_broken_archives(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such source"):
        open_source(str(tmp_path / "nowhere"), 8)
    for name, words in (("a.zip", "not a readable zip"), ("a.parquet", "not readable as Parquet")):
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(DataError, match=words):
            open_source(str(tmp_path / name), 8)
