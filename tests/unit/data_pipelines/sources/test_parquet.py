"""Parquet sources: Hugging Face's layout and plain columns, any row groups, and schemas that cannot be read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.sources.base import BadImage, Sample
from data_pipelines.sources.listing import Choice
from data_pipelines.sources.open import open_source
from data_pipelines.sources.parquet import _batch_rows, _Columns
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
        ("a-00000001", "label 3 is not one of the 3 classes"),
        ("a-00000002", "label -1 is not one of the 3 classes"),
        ("a-00000003", "its label is null"),
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
    with pytest.raises(DataError, match=r"1\.parquet: lacks a column of 0\.parquet, 'label'$"):
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


SPLIT_FILES = (
    "train-00000-of-00002.parquet",
    "train-00001-of-00002.parquet",
    "validation-00000-of-00001.parquet",
    "test-0.parquet",
)


def test_a_hugging_face_repository_is_read_split_by_split(tmp_path: Path) -> None:
    """Fault: train, validation and test become one set, or data/ below a README is not found."""
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("---")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs")
    for number, name in enumerate(SPLIT_FILES):
        pq.write_table(table([number] * (number + 1)), tmp_path / "data" / name)
    for root in (tmp_path, tmp_path / "data"):
        with pytest.raises(ConfigError, match=r"several splits \(2 of train, 1 of validation, 1 of test\)"):
            open_source(str(root), 8)
        sizes = [len(open_source(str(root), 8, choice=Choice(split=split))) for split in ("train", "validation", "all")]
        assert sizes == [3, 3, 10]
    told = "\n".join(open_source(str(tmp_path), 8, choice=Choice(split="test")).told)
    for words in (
        "images: 4 rows of 1 table, column 'image'",
        "split: test, by --split (2 of train, 1 of validation, 1 of test)",
        "classes: 4, column 'label'",
        "left out: hidden or a system's own: 1 (such as '.gitattributes')",
        "left out: no pictures: 1 (1 .md; such as 'README.md')",
        "left out: not of the split test: 3 (3 .parquet;",
    ):
        assert words in told


def test_tables_in_several_folders_are_refused(tmp_path: Path) -> None:
    """Fault: a small and a full configuration of one data set are merged."""
    for name in ("full", "small"):
        (tmp_path / name).mkdir()
        pq.write_table(table([0, 1]), tmp_path / name / "train-0.parquet")
    with pytest.raises(
        ConfigError, match=r"tables in several folders, 'full' and 'small'; choose by --include 'full/\*'"
    ):
        open_source(str(tmp_path), 8)
    assert len(open_source(str(tmp_path), 8, choice=Choice(include=("full/*",)))) == 2


def test_columns_are_chosen_and_the_others_told(tmp_path: Path) -> None:
    """Fault: the column of masks is packed because it comes first."""
    columns = {"mask": [encode(noise(9))] * 2, "image": [encode(noise(0))] * 2, "coarse": [4, 2], "label": [0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), 8)
    assert np.array_equal(good(source)[0].image, noise(0))
    assert "left out: columns: 2 (such as 'mask')" in source.told
    chosen = open_source(str(tmp_path / "a.parquet"), 8, choice=Choice(classes="coarse"))
    assert [item.label for item in good(chosen)] == [4, 2]
    assert open_source(str(tmp_path / "a.parquet"), 8, choice=Choice(classes="none")).class_names == ()
    with pytest.raises(ConfigError, match="--classes folders: no such column; has"):
        open_source(str(tmp_path / "a.parquet"), 8, choice=Choice(classes="folders"))
    pq.write_table(pa.table({"before": columns["mask"], "after": columns["image"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"several columns of images, \['before', 'after'\]"):
        open_source(str(tmp_path / "a.parquet"), 8)
    assert len(open_source(str(tmp_path / "a.parquet"), 8, choice=Choice(exclude=("before",)))) == 2


def test_a_column_that_unpacks_to_too_much_is_refused_by_its_metadata(tmp_path: Path) -> None:
    """Fault: a file of a kilobyte takes gigabytes."""
    pq.write_table(pa.table({"image": [bytes(4 << 20)]}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2000
    with pytest.raises(
        DataError, match=r"a\.parquet: \d+ bytes of a column unpack to 4\d+; at most 1 MB, a quarter of"
    ):
        open_source(str(tmp_path / "a.parquet"), 8, max_bytes=4 << 20)


def test_a_record_of_columns_is_read_only_where_memory_is_at_stake() -> None:
    """Fault: pyarrow ends the process where a flipped bit damages it, in place of a DataError when the rows are read."""

    def damaged(number: int) -> None:
        raise AssertionError("terminate called after throwing an instance of 'parquet::ParquetException'")

    group = SimpleNamespace(total_byte_size=1 << 20, num_columns=2, column=damaged)
    assert _batch_rows("a.parquet", group, _Columns("image", None), 64 << 20) == 16
    for size in ((16 << 20) + 1, 0, -1):
        group.total_byte_size = size
        with pytest.raises(AssertionError):
            _batch_rows("a.parquet", group, _Columns("image", None), 64 << 20)


def test_a_value_that_is_repeated_is_read_a_few_rows_at_once(tmp_path: Path) -> None:
    """Fault: 64 rows of one long value, stored once, are 64 copies in memory."""
    value = np.random.default_rng(0).bytes(1 << 20)
    pq.write_table(pa.table({"image": [value] * 64}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), 8, max_bytes=8 << 20)
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in source)
    assert most < 8 << 20


def test_labels_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: 400 million labels, which a file of kilobytes can hold, are read at once."""
    pq.write_table(
        pa.table({"image": pa.nulls(1 << 20, pa.binary()), "label": pa.repeat(pa.scalar(3), 1 << 20)}),
        tmp_path / "a.parquet",
    )
    monkeypatch.setattr(pq, "read_table", lambda *words, **more: pytest.fail("read at once"))
    source = open_source(str(tmp_path / "a.parquet"), 8)
    assert (len(source), source.num_classes) == (1 << 20, 4)


def test_a_pointer_in_place_of_a_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(DataError, match="Git LFS pointer in place of the file: run `git lfs pull`"):
        open_source(str(tmp_path / "a.parquet"), 8)


def test_splits_in_a_column_are_not_merged_until_a_flag_says_so(tmp_path: Path) -> None:
    """Fault: --split is ignored for tables, and the same rows are packed for train and for test."""
    path = tmp_path / "a.parquet"
    pq.write_table(table([0, 1]).append_column("split", [["train", "test"]]), path)
    for split in (None, "train", "all"):
        with pytest.raises(
            ConfigError,
            match=r"the column 'split' speaks of splits; .*--exclude split|--split train: no name speaks of it",
        ):
            open_source(str(path), 8, choice=Choice(split=split))
    assert len(open_source(str(path), 8, choice=Choice(exclude=("split",)))) == 2
    pq.write_table(table([0, 1]), path)
    with pytest.raises(ConfigError, match=r"--split test: no name speaks of it \(1 of no split\)"):
        open_source(str(path), 8, choice=Choice(split="test"))


def test_a_table_of_which_pieces_are_missing_is_refused(tmp_path: Path) -> None:
    """Fault: a download that broke off is half a data set, without a word."""
    pq.write_table(table([0, 1]), tmp_path / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"1 of 2 pieces are missing, such as 'train-00001-of-00002\.parquet'"):
        open_source(str(tmp_path), 8)
    assert len(open_source(str(tmp_path), 8, choice=Choice(include=("*",)))) == 2
    pq.write_table(table([1, 0]), tmp_path / "train-00001-of-00002.parquet")
    assert len(open_source(str(tmp_path), 8)) == 4


@pytest.mark.parametrize("names", [("label", "labels"), ("class_id",), ("Label",), ("category",)])
def test_columns_that_may_be_labels_are_asked_about(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Fault: labels are dropped, or one of two columns is taken, without a word."""
    path = tmp_path / "a.parquet"
    rows = pa.table({"image": [encode(noise(0)), encode(noise(1))]} | {name: [0, 1] for name in names})
    pq.write_table(rows, path)
    with pytest.raises(ConfigError, match=f"may be labels; choose by --classes {names[0]} or --classes "):
        open_source(str(path), 8)
    assert open_source(str(path), 8, choice=Choice(classes=names[-1])).class_names == ("0", "1")
    assert open_source(str(path), 8, choice=Choice(classes="none")).class_names == ()
