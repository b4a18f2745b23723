"""Parquet sources: Hugging Face's layout and plain columns, any row groups, and schemas that cannot be read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.sources.base import BadImage, Sample
from data_pipelines.sources.open import open_source
from tests.support.pictures import encode, good, noise
from warm_dist.errors import ConfigError, DataError

NAMES = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat", "dog", "emu"]}}}})}


def table(labels: list[int | None]) -> pa.Table:
    images = [{"bytes": encode(noise(seed)), "path": None} for seed in range(len(labels))]
    return pa.table({"image": images, "label": labels})


def test_parquet_in_hugging_face_layout_and_plain(tmp_path: Path) -> None:
    """Fault: images are found only in structs or only in plain columns, or the metadata's class names are ignored."""
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
    with pytest.raises(DataError, match="no column of images"):
        open_source(str(tmp_path / "none.parquet"), 8)


@pytest.mark.parametrize("group_size", [1, 3, 70, 1000])
def test_any_part_over_any_row_groups(tmp_path: Path, group_size: int) -> None:
    """Fault: a part that begins or ends within a row group, a batch or a file has other rows."""
    labels = [number % 3 for number in range(150)]
    for start in (0, 100):
        pq.write_table(table(labels)[start : start + 100], tmp_path / f"{start}.parquet", row_group_size=group_size)
    source = open_source(str(tmp_path), 8)
    assert source.class_names == ("0", "1", "2")
    whole = good(source)
    assert [item.key for item in whole] == [f"{100 * (n // 100)}-{n % 100:08d}" for n in range(150)]
    for start, stop in ((0, 150), (0, 1), (65, 66), (99, 101), (20, 140), (149, 150), (7, 7)):
        part = list(pickle.loads(pickle.dumps(source.part(start, stop))))
        assert [item.key for item in part] == [item.key for item in whole[start:stop]]
        assert all(np.array_equal(item.image, noise(n)) for n, item in enumerate(part, start))


def test_labels_outside_of_the_classes_are_bad_images(tmp_path: Path) -> None:
    pq.write_table(table([0, 3, -1, None, 2]).replace_schema_metadata(NAMES), tmp_path / "a.parquet")
    bad = [item for item in open_source(str(tmp_path / "a.parquet"), 8) if isinstance(item, BadImage)]
    assert [(item.key, item.reason) for item in bad] == [
        (f"a-{row:08d}", f"label {label} is not one of the 3 classes") for row, label in ((1, 3), (2, -1), (3, -1))
    ]


def test_empty_cells_and_damaged_images_are_bad_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [encode(noise(0)), b"", None, b"no image"]}), tmp_path / "a.parquet")
    items = list(open_source(str(tmp_path / "a.parquet"), 8))
    assert [type(item) for item in items] == [Sample, BadImage, BadImage, BadImage]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": ["a.png"]}, "no column of images"),  # paths, as a string
        ({"image": [{"bytes": "text"}]}, "no column of images"),
        ({"image": [b"x"], "label": ["cat"]}, "column 'label' is string, class labels must be integers"),
        ({"image": [b"x"], "label": [1 << 40]}, "has the label 1099511627776"),
        ({"image": pa.array([], pa.list_(pa.binary()))}, "no column of images"),
    ],
)
def test_schemas_that_cannot_be_read(tmp_path: Path, columns: dict[str, object], words: str) -> None:
    """Fault: a column of paths is taken for images, or one of words for class numbers."""
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=words):
        open_source(str(tmp_path / "a.parquet"), 8)


def test_files_of_one_source_have_one_schema(tmp_path: Path) -> None:
    pq.write_table(table([0, 1]), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": [encode(noise(0))], "label": [1]}), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"1\.parquet: its columns .* have the types"):
        open_source(str(tmp_path), 8)
    pq.write_table(pa.table({"image": [{"bytes": encode(noise(0)), "path": None}]}), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"1\.parquet: lacks the column .*label.* of 0\.parquet"):
        open_source(str(tmp_path), 8)


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table([0] * 50).replace_schema_metadata(NAMES), path, row_group_size=10)
    column = pq.read_metadata(path).row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 20] = b"\xff" * 20  # the header of its first page
    path.write_bytes(data)
    source = open_source(str(path), 8)
    assert len(list(source.part(0, 20))) == 20
    with pytest.raises(DataError, match=rf"{path}: row group 2 cannot be read"):
        list(source)


def test_rows_are_not_shuffled(tmp_path: Path) -> None:
    """Fault: --shuffle is accepted and ignored."""
    pq.write_table(table([0, 1]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="can only be read in its own order; leave out --shuffle"):
        open_source(str(tmp_path / "a.parquet"), 8, shuffle=True)


@pytest.mark.parametrize(
    "metadata", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"names": null}}}}']
)
def test_foreign_metadata_are_passed_over(tmp_path: Path, metadata: bytes) -> None:
    pq.write_table(table([0, 1]).replace_schema_metadata({b"huggingface": metadata}), tmp_path / "a.parquet")
    assert open_source(str(tmp_path / "a.parquet"), 8).class_names == ("0", "1")
