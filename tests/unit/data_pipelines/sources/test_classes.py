"""Labels by EDM's dataset.json and by cls files, in any container, and files of that name that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.sources.base import Source
from data_pipelines.sources.listing import Choice
from data_pipelines.sources.open import open_source
from tests.support.pictures import encode, good, noise
from tests.unit.data_pipelines.sources.test_listing import as_folder, as_tar, as_zip
from warm_dist.errors import ConfigError, DataError

NAMES = [f"{number // 4:05d}/img{number:08d}.png" for number in range(8)]
LABELS = [[name, 3 * number % 5] for number, name in enumerate(NAMES)]


def opened(path: Path, tree: Any, names: list[str] = NAMES, choice: Choice | None = None, prefix: str = "") -> Source:
    """Pictures and a dataset.json (text, or to be written as JSON) in a zip; in a folder and a tar it is the same."""
    text = tree if isinstance(tree, str) else json.dumps(tree)
    files = {f"{prefix}{name}": encode(noise(0)) for name in names} | {f"{prefix}dataset.json": text.encode()}
    told = []
    for kind, write in (("zip", as_zip), ("folder", as_folder), ("tar", as_tar)):
        write(path / f"x.{kind}", files)
        source = open_source(str(path / f"x.{kind}"), 8, choice=choice or Choice())
        told.append((source.class_names, [(item.key, item.label) for item in good(source)]))
    assert told[0] == told[1] == told[2]
    return source


@pytest.mark.parametrize("prefix", ["", "cifar10-32x32/"])
def test_edm_labels_are_the_classes(tmp_path: Path, prefix: str) -> None:
    """Fault: the folders 00000 and 00001, which only hold thousands of files each, are the classes."""
    source = opened(tmp_path, {"labels": LABELS}, prefix=prefix)
    assert source.class_names == tuple("01234")
    assert [item.label for item in good(source)] == [label for _, label in LABELS]
    assert "classes: 5, by dataset.json" in source.told
    by_folders = opened(tmp_path, {"labels": LABELS}, choice=Choice(classes="folders"), prefix=prefix)
    assert by_folders.class_names == ("00000", "00001")


def test_classes_without_a_picture_are_told(tmp_path: Path) -> None:
    source = opened(tmp_path, {"labels": [[name, 40] for name in NAMES]})
    assert source.num_classes == 41
    assert "classes: 41, by dataset.json, 40 of them without a picture" in source.told


def test_labels_of_null_are_no_classes(tmp_path: Path) -> None:
    source = opened(tmp_path, {"labels": None})
    assert source.class_names == ()
    assert "classes: none, by dataset.json, whose labels are null" in source.told


def test_names_are_compared_as_edm_does(tmp_path: Path) -> None:
    slashes = [[name.replace("/", "\\"), label] for name, label in LABELS]
    source = opened(tmp_path, {"labels": [*slashes, LABELS[0], ["gone.png", 4]]})
    assert [item.label for item in good(source)] == [label for _, label in LABELS]
    assert "left out: named by dataset.json, but not there or not taken: 1 (1 .png; such as 'gone.png')" in source.told


DAMAGED = (
    ('{"labels": [], "labels": null}', "dataset.json cannot be read (a key appears twice in one object)"),
    ({"labels": LABELS[1:]}, "dataset.json has no label for 1 of 8 pictures, such as '00000/img00000000.png'"),
    ({"labels": [*LABELS, [NAMES[0], 4]]}, "has the labels 0 and 4"),
    ({"labels": [*LABELS[1:], [NAMES[0], 0.5]]}, "has the label 0.5, needs an integer"),
    ({"labels": [*LABELS[1:], [NAMES[0], True]]}, "has the label True, needs an integer"),
    ({"labels": [*LABELS[1:], [NAMES[0], -1]]}, "has the label -1, needs an integer"),
    ({"labels": [*LABELS[1:], [NAMES[0], 10**9]]}, "has the label 1000000000, needs an integer"),
    ({"labels": {"a.png": 1}}, "must be null or pairs of a name and a class, has {'a.png': 1}"),
    ({"labels": [["a.png", 1, 2]]}, "must be null or pairs of a name and a class, has ['a.png', 1, 2]"),
    ('{"labels": [', "cannot be read (Expecting value"),
    ("[" * 100_000, "cannot be read ("),
)


@pytest.mark.parametrize(("tree", "words"), DAMAGED)
def test_labels_that_cannot_be_meant(tmp_path: Path, tree: Any, words: str) -> None:
    """Fault: pictures get a class that nobody gave them, or a traceback instead."""
    with pytest.raises(DataError) as caught:
        opened(tmp_path, tree)
    assert words in str(caught.value)
    assert opened(tmp_path, tree, choice=Choice(classes="none")).class_names == ()


def test_a_dataset_json_labels_what_is_below_it(tmp_path: Path) -> None:
    """Fault: one in a class folder is taken for that of all pictures; or its folder's name breaks the message's line."""
    inner = {"two\nlines/dataset.json": b"[["}
    as_zip(tmp_path / "x.zip", {"a.png": encode(noise(0)), **inner})
    source = open_source(str(tmp_path / "x.zip"), 8)
    assert any("not the outermost around all pictures: 1 (1 .json" in line for line in source.told)
    as_zip(tmp_path / "x.zip", {"two\nlines/a.png": encode(noise(0)), **inner})
    with pytest.raises(DataError, match=r"x\.zip: two\\nlines/dataset\.json cannot be read"):
        open_source(str(tmp_path / "x.zip"), 8)
    labels = {f"{split}/dataset.json": json.dumps({"labels": [["0/a.png", 4]]}).encode() for split in ("train", "test")}
    as_zip(tmp_path / "x.zip", labels | {f"{split}/0/a.png": encode(noise(1)) for split in ("train", "test")})
    chosen = open_source(str(tmp_path / "x.zip"), 8, choice=Choice(split="test"))
    assert [item.label for item in good(chosen)] == [4]


@pytest.mark.parametrize("tree", [[], {"images": []}, 3])
def test_a_dataset_json_of_others_is_passed_over(tmp_path: Path, tree: Any) -> None:
    names = ["ant/a.png", "bee/b.png"]
    source = opened(tmp_path, tree, names)
    assert source.class_names == ("ant", "bee")
    assert any("not EDM's, it has no 'labels'" in line for line in source.told)
    with pytest.raises(ConfigError, match=r"--classes dataset\.json: there is none with labels"):
        opened(tmp_path, tree, names, Choice(classes="dataset.json"))


def test_cls_files_label_samples_in_any_container(tmp_path: Path) -> None:
    """Fault: a suffix in capitals, or a name with dots, takes the labels away without a word."""
    files = {"x/a.b.PNG": encode(noise(0)), "x/a.b.CLS": b"2", "x/c.jpg": encode(noise(1), "JPEG"), "x/c.Cls": b"0\n",
             "x/d.img.png": encode(noise(2)), "x/d.cls": b"1"}  # fmt: skip
    for kind, write in (("zip", as_zip), ("folder", as_folder), ("tar", as_tar)):
        write(tmp_path / f"x.{kind}", files)
        source = open_source(str(tmp_path / f"x.{kind}"), 8)
        assert [item.label for item in good(source)] == [2, 0, 1]
        assert source.class_names == tuple("012")
        assert open_source(str(tmp_path / f"x.{kind}"), 8, choice=Choice(classes="none")).class_names == ()


def test_two_pictures_of_one_sample_and_two_kinds_of_labels_are_refused(tmp_path: Path) -> None:
    files = {"a.jpg": encode(noise(0), "JPEG"), "a.depth.png": encode(noise(1)), "a.cls": b"1"}
    as_tar(tmp_path / "a.tar", files)
    with pytest.raises(ConfigError, match=r"seem to be masks|two pictures of one sample"):
        open_source(str(tmp_path / "a.tar"), 8)
    as_tar(tmp_path / "a.tar", {"a.jpg": files["a.jpg"], "a.other.png": files["a.depth.png"], "a.cls": b"1"})
    with pytest.raises(ConfigError, match=r"two pictures of one sample, 'a\.jpg' and 'a\.other\.png'"):
        open_source(str(tmp_path / "a.tar"), 8)
    both = {"a.png": files["a.depth.png"], "a.cls": b"1", "dataset.json": b'{"labels": [["a.png", 2]]}'}
    as_zip(tmp_path / "a.zip", both)
    with pytest.raises(ConfigError, match=r"both dataset\.json and cls files"):
        open_source(str(tmp_path / "a.zip"), 8)
    for classes, label in (("cls", 1), ("dataset.json", 2)):
        chosen = good(open_source(str(tmp_path / "a.zip"), 8, choice=Choice(classes=classes)))
        assert [item.label for item in chosen] == [label]
