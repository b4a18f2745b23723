"""Tars and zips as sources."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.pack import pack
from data_pipelines.sources import base
from data_pipelines.sources.base import BadImage
from data_pipelines.sources.open import open_source
from tests.support.pictures import encode, good, noise
from warm_dist.errors import DataError


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_tar_of_class_folders(tmp_path: Path) -> None:
    """Fault: a folder that wraps all others is the only class, or labels follow the order in the tar."""
    members = {f"wrapped/{name}.png": encode(noise(n)) for n, name in enumerate(("zebra/b", "zebra/a", "ant/x"))}
    source = open_source(str(write_tar(tmp_path / "a.tar", members | {"wrapped/readme.txt": b"hello"})), 8)
    assert source.class_names == ("ant", "zebra")
    assert [(item.key, item.label) for item in good(source)] == [
        ("wrapped/ant/x.png", 0),
        ("wrapped/zebra/a.png", 1),
        ("wrapped/zebra/b.png", 1),
    ]
    assert np.array_equal(good(source)[2].image, noise(0))


def test_a_zip_with_a_member_without_a_name(tmp_path: Path) -> None:
    """Fault: one byte of a name is lost, and the archive ends the program with a traceback."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("ant/x.png", encode(noise(0)))
        archive.writestr("nameless", b"")
    path = tmp_path / "a.zip"
    path.write_bytes(content.getvalue().replace(b"nameless", b"\0ameless"))
    assert [item.key for item in good(open_source(str(path), 8))] == ["ant/x.png"]


def test_webdataset_shards_are_packed_again(tmp_path: Path) -> None:
    """Fault: `cls` members are ignored, so that all images get the label -1 or that of a folder."""
    for shard in range(3):
        members = {}
        for number in range(4):
            members[f"{shard}{number}.png"] = encode(noise(10 * shard + number, 16))
            members[f"{shard}{number}.cls"] = str((shard + number) % 5).encode()
        write_tar(tmp_path / f"{shard}.tar", members)
    source = open_source(str(tmp_path), 8)
    assert source.num_classes == 5
    assert [item.label for item in good(source)] == [(shard + number) % 5 for shard in range(3) for number in range(4)]
    expected = noise(21, 16).reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(good(source)[9].image - expected).max() <= 1
    part = pickle.loads(pickle.dumps(source.part(2, 7)))  # a process that packs gets it so
    assert [item.key for item in part] == [item.key for item in good(source)][2:7]
    assert pack(source, str(tmp_path / "out"), shard_size=5).info.num_images == 12


def test_tars_that_cannot_be_packed(tmp_path: Path) -> None:
    """Fault: an image without a label, or with a word or a huge number as its label, is packed all the same."""
    picture = encode(noise(0))
    for members, words in (
        ({"a.png": picture, "a.cls": b"1", "b.png": picture}, "'b.png' has no cls member"),
        ({"a.png": picture, "a.cls": b"cat"}, "has the label 'cat'"),
        ({"a.png": picture, "a.cls": b"9" * 20}, "needs a class number"),
    ):
        with pytest.raises(DataError, match=words):
            open_source(str(write_tar(tmp_path / "a.tar", members)), 8)
    write_tar(tmp_path / "a.tar", {"a.png": picture})
    write_tar(tmp_path / "b.tar", {"a.png": picture})
    with pytest.raises(DataError, match=r"the file 'a\.png' occurs twice"):
        open_source(str(tmp_path), 8)


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


def test_files_that_no_picture_needs_are_bad_images(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a file that is too large for a picture is read into memory before its size is checked."""
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(5000))
        archive.writestr("b.png", encode(noise(0)))
    (tree / "ant" / "x.png").write_bytes(bytes(5000))
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 4000)
    for spec, name in ((tmp_path / "bomb.zip", "a.png"), (tree, "ant/x.png")):
        bad = [item for item in open_source(str(spec), 8) if isinstance(item, BadImage)]
        assert [item.key for item in bad] == [name]
        assert "5000 bytes, at most 4000 are allowed" in bad[0].reason
