"""A folder of pictures: order, labels, and what does not decode."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.pack import Packing, pack
from data_pipelines.sources.base import BadImage
from data_pipelines.sources.listing import Choice
from data_pipelines.sources.open import open_source
from tests.support.pictures import encode, good, noise
from warm_dist.errors import AccessError, ConfigError


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


def test_what_does_not_decode_comes_out_as_a_bad_image(tree: Path) -> None:
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
    assert [item.reason for item in bad[2:]] == ["empty", "no picture of a known format"]


def test_links_are_followed_and_each_folder_is_listed_once(tree: Path, tmp_path: Path) -> None:
    """Fault: a class that is a link is left out, or a loop of links never ends or lists pictures twice."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "z.png").write_bytes(encode(noise(5)))
    (tree / "bee").symlink_to(tmp_path / "elsewhere" / "deep")
    (tree / "ant" / "loop").symlink_to(tree)
    (tree / "ant" / "self").symlink_to("self")
    (tree / "ant" / "lost.png").symlink_to("nowhere.png")
    (tree / "ant" / "link.png").symlink_to(tree / "ant" / "x.png")
    os.mkfifo(tree / "ant" / "pipe.png")
    (tree / "cow").mkdir()
    source = open_source(str(tree), 8)
    assert source.class_names == ("ant", "bee", "zebra")
    keys = ["ant/link.png", "ant/x.png", "ant/y.png", "bee/z.png", "zebra/a.png", "zebra/b.png"]
    assert [item.key for item in good(source)] == keys
    told = "\n".join(source.told)
    assert "links to folders that are listed already: 1 (such as 'ant/loop/')" in told
    assert "broken links: 2 (1 .png, 1 without suffix; such as 'ant/lost.png')" in told
    assert "no regular files: 1 (1 .png;" in told
    assert "empty folders: 1 (such as 'cow/')" in told  # else a class that is gone goes unnoticed


def test_a_tree_of_links_that_doubles_at_each_level_takes_no_time(tmp_path: Path) -> None:
    """Fault: each way through a graph of links is walked: 2^40 of them."""
    for level in range(40):
        (tmp_path / f"{level}").mkdir()
        for name in "ab":
            (tmp_path / f"{level}" / name).symlink_to(tmp_path / f"{level + 1}")
    (tmp_path / "40").mkdir()
    (tmp_path / "40" / "x.png").write_bytes(encode(noise(0)))
    assert len(open_source(str(tmp_path), 8)) == 1


@pytest.mark.parametrize("where", [".", "ant/packed", "d8"])
def test_packed_data_are_no_pictures_of_the_folder_they_are_in(tree: Path, tmp_path: Path, where: str) -> None:
    """Fault: shards that an earlier packing left beside or below the pictures are taken for the source."""
    (tmp_path / "link").symlink_to(tree)
    packing = Packing(open_source(str(tree), 8), str(tree / where), shard_size=2)
    for step in (lambda: packing.run(part=(1, 2)), packing.run, packing.finish):
        step()
        for spec, output in ((tree, tmp_path / "link" / where), (tmp_path / "link", tree / where)):
            again = open_source(str(spec), 8, output=output)
            assert [item.label for item in good(again)] == [0, 0, 1, 1]
    if where == ".":  # but somebody else's shards may be meant
        with pytest.raises(ConfigError, match=r"holds 2 \.tar files and 4 picture files; --include '\*\.tar' takes"):
            open_source(str(tree), 8, output=tmp_path)
    assert len(open_source(str(tree), 8, choice=Choice(exclude=("*.tar",)))) == 4


def test_packed_shards_are_packed_again(tree: Path, tmp_path: Path) -> None:
    """Fault: the manifest beside shards is taken for the tables of a Parquet source."""
    pack(open_source(str(tree), 8), str(tmp_path / "out"), payload="png")
    again = open_source(str(tmp_path / "out"), 8)
    assert [item.label for item in good(again)] == [0, 0, 1, 1]


def test_a_folder_that_may_not_be_listed_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "zebra":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(AccessError, match=r"tree/zebra/?: cannot be listed \(Permission denied\)"):
        open_source(str(tree), 8)
