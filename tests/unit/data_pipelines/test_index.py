"""A manifest for shards that others made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipelines import index
from data_pipelines.pack import pack
from data_pipelines.shards import indexed
from data_pipelines.shards.indexed import index_shard
from data_pipelines.shards.manifest import NAME, read_manifest
from tests.support.commands import call
from tests.support.packing import contents, damages, foreign_tar, noise_source, png
from warm_dist.errors import DataError


def test_foreign_shards_get_a_manifest(tmp_path: Path) -> None:
    """Fault: the extra header of a long name shifts the offsets, or a suffix in capitals is no image."""
    name = "a-very-long-folder-name-that-does-not-fit-into-an-ustar-header/" * 3  # GNU and pax extensions
    foreign_tar(
        tmp_path / "x.tar", {f"{name}one.png": png(1), f"{name}one.cls": b"4", "d/two.PNG": png(2), "d/two.cls": b"0\n"}
    )
    foreign_tar(
        tmp_path / "y.tar",
        {
            "d/Thumbs.db": b"",
            "._three.png": b"",
            ".ipynb_checkpoints/a.png": b"",
            "three.json": b"{}",
            "three.cls": b"1",
            "three.png": png(3),
        },
    )
    assert call(index.main, tmp_path, "--workers", 1) == 0
    manifest = read_manifest(f"{tmp_path}/{NAME}")
    assert manifest.key.tolist() == [f"{name}one", "d/two", "three"]
    assert manifest.label.tolist() == [4, 0, 1]
    assert (manifest.info.num_classes, manifest.payload, manifest.info.resolution) == (5, "png", 8)
    assert damages(manifest, str(tmp_path)) == []
    pack(noise_source(3), str(tmp_path))  # takes the place, but deletes nothing that it did not write
    assert {"x.tar", "y.tar"} <= set(contents(tmp_path))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.png": png(1), "a.jpg": png(1)}, "needs one image"),
        ({"a.cls": b"1"}, "needs one image"),
        ({"a.png": png(1), "a.cls": b"cat"}, "the label 'cat'"),
        ({"a.png": b"no image"}, "image 'a' in shard x.tar: does not decode"),
        ({"a.png": png(1), "b.png": png(2, 16)}, "image 'b' in shard x.tar.*are needed"),
        ({"a.png": png(1), "a.PNG": png(2)}, "member 'a.PNG' occurs twice"),
    ],
)
def test_foreign_shards_that_cannot_be_used(tmp_path: Path, members: dict[str, bytes], words: str) -> None:
    """Fault: a sample with two images, a word as its label or another size is found only in training."""
    foreign_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=words):
        index_shard(tmp_path / "x.tar", "x.tar")


def test_truncated_tars_and_garbage_inside_are_noticed(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "whole.tar", {f"{n}.png": png(n) for n in range(4)})
    whole = (tmp_path / "whole.tar").read_bytes()
    second = whole.index(b"1.png")
    for damaged in (
        whole[: second + 20],
        whole[:second],
        whole[: second + 600],
        whole[:second] + os.urandom(512) + whole[second + 512 :],
    ):
        (tmp_path / "x.tar").write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.tar: (not a readable tar|truncated)"):
            index_shard(tmp_path / "x.tar", "x.tar")


def test_a_key_of_two_shards_is_refused(tmp_path: Path) -> None:
    """Errors, bad lists and resumes name an image by its key alone."""
    for name in ("x.tar", "y.tar"):
        foreign_tar(tmp_path / name, {"a.png": png(1)})
    with pytest.raises(DataError, match=r"shard y\.tar: a key occurs twice"):
        indexed.merge([index_shard(tmp_path / name, name) for name in ("x.tar", "y.tar")])


def test_class_names_of_the_same_shards_stay_and_those_of_others_are_refused(tmp_path: Path) -> None:
    """Fault: indexing a packed data set again turns its class names into numbers."""
    packed = pack(noise_source(9), str(tmp_path), shard_size=4)
    assert call(index.main, tmp_path, "--workers", 1) == 0
    again = read_manifest(f"{tmp_path}/{NAME}")
    assert (
        (again.class_names, again.attribution)
        == (packed.class_names, packed.attribution)
        == (("a", "b", "c"), "made up")
    )
    assert again.label.tolist() == packed.label.tolist()
    (tmp_path / packed.shards[0].name).unlink()
    with pytest.raises(DataError, match=r"its 3 class names are of other shards than those there; move it away"):
        call(index.main, tmp_path, "--workers", 1)
    (tmp_path / NAME).unlink()
    assert call(index.main, tmp_path, "--workers", 1) == 0
    assert read_manifest(f"{tmp_path}/{NAME}").class_names == ("0", "1", "2")


def test_keys_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    """Fault: a name of other bytes ends indexing in a UnicodeEncodeError, or moves a reader's cursor."""
    foreign_tar(tmp_path / "x.tar", {b"\xffa\x1b[1m.png".decode("utf-8", "surrogateescape"): png(1)})
    assert call(index.main, tmp_path, "--workers", 1) == 0
    assert read_manifest(f"{tmp_path}/{NAME}").key.tolist() == ["\\udcffa\\x1b[1m"]
