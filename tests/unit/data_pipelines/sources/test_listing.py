"""What a listing takes and leaves out, in a folder, a zip and a tar alike; two plausible readings are refused."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from data_pipelines.sources.base import Source
from data_pipelines.sources.listing import Choice
from data_pipelines.sources.open import open_source
from tests.support.pictures import encode, good, noise
from warm_dist.errors import ConfigError, DataError

PNG = encode(noise(0))
Open = Callable[..., Source]


def as_folder(path: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def as_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def as_tar(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(params=["folder", "zip", "tar", "tars"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens these files, pictures unless their content is given, in each kind of container."""

    def opened(*names: str, contents: Mapping[str, bytes] | None = None, **choice: object) -> Source:
        kind = request.param
        path = tmp_path / ("in" if kind == "folder" else "in/a.tar" if kind == "tars" else f"in.{kind}")
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        (tmp_path / "in").mkdir()
        files = dict.fromkeys(names, PNG) | dict(contents or {})
        {"folder": as_folder, "zip": as_zip, "tar": as_tar, "tars": as_tar}[kind](path, files)
        return open_source(str(path.parent if kind == "tars" else path), 8, choice=Choice(**choice))

    return opened


def keys(source: Source) -> list[str]:
    return sorted(item.key for item in good(source))


def left_out(source: Source) -> list[str]:
    return [line.removeprefix("left out: ") for line in source.told if line.startswith("left out")]


CLASSES = ("ant/a.png", "ant/b.png", "bee/a.png")
JUNK = (".DS_Store", "ant/._a.png", "__MACOSX/ant/._a.png", "__MACOSX/ant/a.png", "ant/.ipynb_checkpoints/a.png",
        "@eaDir/a.png", "ant/@eaDir/a.png", "Thumbs.db", "bee/desktop.ini", ".git/x.png")  # fmt: skip


def test_what_systems_leave_changes_no_class_and_is_counted(source: Open) -> None:
    """Fault: a hidden folder or a thumbnail counts as a class, or goes without being counted."""
    found = source(*CLASSES, *JUNK)
    assert (keys(found), found.class_names) == (sorted(CLASSES), ("ant", "bee"))
    (line,) = left_out(found)
    assert line.startswith("hidden or a system's own: ")


@pytest.mark.parametrize("stray", ["top.png", "ant/deep/c.png"])
def test_a_picture_off_the_class_folders_is_refused_until_a_flag_decides(source: Open, stray: str) -> None:
    """Fault: one stray picture takes all labels away without a word."""
    with pytest.raises(ConfigError, match=r"--classes folders takes the folders 'ant', 'bee'.*--classes none"):
        source(*CLASSES, stray)
    none = source(*CLASSES, stray, classes="none")
    assert (len(none), none.class_names) == (4, ())
    folders = source(*CLASSES, stray, classes="folders")
    assert folders.class_names == ("ant", "bee")
    assert ("in no class folder: 1 (1 .png;" in left_out(folders)[0]) if stray == "top.png" else len(folders) == 4
    assert source(*CLASSES, stray, exclude=(stray,)).class_names == ("ant", "bee")


def test_folders_that_may_only_hold_thousands_each_are_refused(source: Open) -> None:
    """Fault: FFHQ's folders 00000, 01000, … are 70 classes."""
    names = ("00000/1.png", "01000/2.png")
    with pytest.raises(ConfigError, match="may be classes, or only hold thousands each"):
        source(*names)
    assert source(*names, classes="folders").class_names == ("00000", "01000")
    assert source("0/1.png", "1/2.png").class_names == ("0", "1")  # as MNIST's


def test_one_folder_around_everything_is_no_class(source: Open) -> None:
    assert source("photos/a.png", "photos/b.png").class_names == ()
    assert source("set/x/ant/a.png", "set/x/bee/b.png").class_names == ("ant", "bee")
    assert source("photos/a.png", "photos/b.png", classes="folders").class_names == ("photos",)
    mixed = source("a.png", "photos/b.png", "photos/c.png", classes="folders")
    assert (len(mixed), mixed.class_names) == (2, ("photos",))


def test_classes_that_there_are_none_of_are_refused(source: Open) -> None:
    """Fault: a misspelt way to label pictures means the usual one."""
    for classes, words in (
        ("label", "pictures have folders, none, dataset.json or cls"),
        ("folders", "no picture is in a folder"),
        ("cls", "there is none with labels"),
    ):
        with pytest.raises(ConfigError, match=f"--classes {classes}: {words}"):
            source("a.png", "b.png", classes=classes)


SPLITS = (
    (["train/ant/a.png", "train/bee/b.png", "val/ant/c.png", "test/ant/d.png"], ("ant", "bee")),
    (["x/training_set/a.png", "x/training_set/b.png", "x/test_set/c.png", "x/validation_set/e.png"], ()),
    (["ant/train/a.png", "bee/train/b.png", "ant/test/c.png", "bee/valid/d.png"], ("ant", "bee")),
    (["trainA/a.png", "trainA/b.png", "testA/c.png", "valA/d.png"], ()),
    (["train_1.png", "train_2.png", "test_1.png", "dev_1.png"], ()),
)


@pytest.mark.parametrize(("names", "classes"), SPLITS)
def test_splits_are_not_merged_until_a_flag_says_so(source: Open, names: list[str], classes: tuple[str, ...]) -> None:
    """Fault: training, validation and test become one training set, or a split becomes a class."""
    with pytest.raises(ConfigError, match=r"several splits \(2 of train, 1 of validation, 1 of test\); --split train"):
        source(*names)
    train = source(*names, split="train")
    assert (keys(train), train.class_names) == (sorted(names[:2]), classes)
    assert left_out(train) == [
        "not of the split train: 2 (2 .png; such as " + left_out(train)[0].partition("such as ")[2]
    ]
    assert len(source(*names, split="test")) == 1
    merged = source(*names, split="all")
    assert (len(merged), merged.class_names) == (4, classes)
    with pytest.raises(ConfigError, match="--split test: no name speaks of it"):
        source(*CLASSES, split="test")


def test_folders_of_splits_beside_others_are_refused(source: Open) -> None:
    """Fault: STL-10's test images are packed with its training and unlabelled ones."""
    names = ("train/a.png", "test/b.png", "unlabeled/c.png")
    with pytest.raises(ConfigError, match=r"several splits \(1 of train, 1 of test, 1 of no split\)"):
        source(*names)
    assert keys(source(*names, split="train")) == ["train/a.png"]
    names = ("cat/a.png", "dog/b.png", "test/c.png")
    with pytest.raises(ConfigError, match=r"names speak of a split, others do not \(1 of test, 2 of no split\)"):
        source(*names)
    assert source(*names, split="none").class_names == ("cat", "dog", "test")
    assert keys(source(*names, split="test")) == ["test/c.png"]


@pytest.mark.parametrize("pair", [("caf\u00e9", "cafe\u0301"), ("Cat", "cat"), ("dog", "dog ")])
def test_folders_that_may_be_one_class_are_asked_about(source: Open, pair: tuple[str, str]) -> None:
    """Fault: pictures of one class, copied by a Mac and by Linux, are two classes."""
    names = [f"{folder}/{number}.png" for number, folder in enumerate((*pair, "emu"))]
    with pytest.raises(ConfigError, match="may be one class; rename one, or --classes folders takes") as caught:
        source(*names)
    assert all(ascii(folder) in str(caught.value) for folder in pair)
    assert source(*names, classes="folders").class_names == tuple(sorted((*pair, "emu")))


def test_a_class_may_be_named_train(source: Open) -> None:
    """Fault: CIFAR-100's class `train` is taken for a split."""
    assert source("train/a.png", "tractor/b.png", "tram/c.png").class_names == ("tractor", "train", "tram")
    assert source("train/a.png", "test/b.png", split="none").class_names == ("test", "train")


MASKED = (
    ["images/a.png", "images/b.png", "masks/a.png", "masks/b.png"],
    ["a.png", "a_mask.png", "b.png", "b_mask.png"],
    ["s/a.jpg.png", "s/b.png", "s/mask_b.png"],
    ["JPEGImages/a.png", "SegmentationClass/a.png"],
    ["train_images/a.png", "train_masks/a.png"],
    ["a.png", "a.seg.png"],
    ["a_rgb.png", "a_mask.png", "b_rgb.png", "b_mask.png"],
    ["img-a.png", "mask-a.png"],
)


@pytest.mark.parametrize("names", MASKED)
def test_masks_beside_pictures_are_refused_and_the_advice_works(source: Open, names: list[str]) -> None:
    """Fault: masks are packed as pictures; or what the message tells to do does not leave them out."""
    with pytest.raises(ConfigError, match=r"seem to be masks.*--include") as caught:
        source(*names)
    pattern = str(caught.value).partition("--exclude '")[2].partition("'")[0]
    rest = keys(source(*names, exclude=(pattern,)))
    assert rest == sorted(name for name in names if "ask" not in name and "eg" not in name.replace("JPEG", ""))
    assert len(source(*names, include=("*",), classes="none")) == len(names)


def test_pictures_are_known_by_suffix_or_content_and_all_else_is_counted(source: Open) -> None:
    """Fault: files with another suffix than the usual are passed over in silence."""
    kinds = {"a.jfif": "JPEG", "b.AVIF": "AVIF", "c": "PNG", "d.BMP": "BMP", "e.TIFF": "TIFF", "f.gif": "GIF", "g.img": "JPEG",
             "h.jp2": "JPEG2000", "i.WebP": "WEBP", "2024.05": "PNG"}  # fmt: skip
    contents = {name: encode(noise(0), kind) for name, kind in kinds.items()}
    others = {
        "a.txt": b"words",
        "b.zip": b"PK",
        "c.dat": b"numbers",
        "d.png.bak": PNG,
        "e.dng": encode(noise(0), "TIFF"),
    }
    found = source(contents=contents | others)
    assert keys(found) == sorted(kinds)
    assert {line.partition(";")[0] for line in left_out(found)} == {
        "archives or tables inside: 1 (1 .zip",
        "backups and unfinished copies: 1 (1 .bak",
        "no pictures: 3 (1 .txt, 1 .dat, 1 .dng",
    }


def test_no_picture_at_all_says_what_is_there(source: Open) -> None:
    contents = {"a/b.npy": b"x", "a/c.npy": b"y", "more.zip": b"PK"}
    with pytest.raises(
        DataError, match=r"no images; left out: no pictures: 2 \(2 \.npy.*archives or tables inside: 1 \(1 \.zip"
    ):
        source(contents=contents)


def test_backslashes_of_a_windows_archive_are_folders(tmp_path: Path) -> None:
    """Fault: `ant\\a.png` is a picture without a class."""
    for kind, write in (("zip", as_zip), ("tar", as_tar)):
        write(tmp_path / f"a.{kind}", {"set\\ant\\a.png": PNG, "set\\bee\\b.PNG": PNG, "set\\bee\\b.txt": b""})
        found = open_source(str(tmp_path / f"a.{kind}"), 8)
        assert (len(good(found)), found.class_names) == (2, ("ant", "bee"))


def test_shards_of_several_splits_and_shards_beside_pictures(tmp_path: Path) -> None:
    """Fault: imagenet-train-….tar and imagenet-val-….tar become one set; patterns for shards empty them of their members."""
    for name in ("x-train-000.tar", "x-train-001.tar", "x-val-000.tar"):
        as_tar(tmp_path / name, {f"{name[2:11]}{number}.png": PNG for number in range(2)})
    with pytest.raises(ConfigError, match=r"several splits \(2 of train, 1 of validation\)"):
        open_source(str(tmp_path), 8)
    assert [len(open_source(str(tmp_path), 8, choice=Choice(split=split))) for split in ("train", "all")] == [4, 6]
    as_tar(tmp_path / "more.tar", {"more.png": PNG})
    with pytest.raises(ConfigError, match=r"2 of train, 1 of validation, 1 of no split"):
        open_source(str(tmp_path), 8)
    (tmp_path / "x-val-000.tar").rename(tmp_path / "x-val-000.tar.bak")
    with pytest.raises(ConfigError, match=r"2 of train, 1 of no split"):
        open_source(str(tmp_path), 8)
    (tmp_path / "x-val-000.tar.bak").rename(tmp_path / "x-val-000.tar")
    (tmp_path / "more.tar").unlink()
    (tmp_path / "logo.png").write_bytes(PNG)
    with pytest.raises(ConfigError, match=r"holds 3 \.tar files and 1 picture file; --include '\*\.tar'"):
        open_source(str(tmp_path), 8, choice=Choice(split="train"))
    assert len(open_source(str(tmp_path), 8, choice=Choice(split="train", include=("*.tar",)))) == 4
    assert len(open_source(str(tmp_path), 8, choice=Choice(exclude=("*.tar",)))) == 1
    inside = Choice(split="train", include=("*.tar", "*0.png"))
    assert len(open_source(str(tmp_path), 8, choice=inside)) == 2


def test_names_made_to_hurt_are_printable_and_survive(tmp_path: Path) -> None:
    """Fault: a class name moves the cursor, breaks a line, or ends in a UnicodeEncodeError."""
    nasty = ["\x1b[2Jred", "line\nbreak", "\u202eright", b"\xff\xfe".decode("utf-8", "surrogateescape"), "x" * 250]
    as_folder(tmp_path / "in", {f"{name}/{number}.png": PNG for number, name in enumerate(nasty)})
    found = open_source(str(tmp_path / "in"), 8)
    assert sorted(found.class_names) == sorted(nasty)
    assert all(line.isprintable() for line in found.told)
    assert {item.label for item in good(found)} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl", "DATASET.JSON", "labels.txt", "list_labels.csv"])
def test_a_table_beside_pictures_without_classes_is_asked_about(source: Open, table: str) -> None:
    """Fault: labels in a form that is not read are dropped without a word."""
    rows = {table: b"file_name,label"}
    with pytest.raises(
        ConfigError, match=f"'{table}' may hold labels, but is not read; --classes none takes no classes"
    ):
        source("a.png", "b.png", contents=rows)
    assert len(source("a.png", "b.png", contents=rows, classes="none")) == 2
    assert source("a/a.png", "b/b.png", contents=rows).class_names == ("a", "b")


@pytest.mark.parametrize("names", [("x.jpg", "x.png"), ("ant/x.png", "ant_gt/x.png"), ("images/x.png", "annots/x.png"),
                                   ("images/x.png", "depth_maps/x.png"), ("a/x.png", "thumbs/x.png")])  # fmt: skip
def test_companions_of_pictures_are_no_pictures_of_their_own(source: Open, names: tuple[str, str]) -> None:
    """Fault: masks, depths and previews are packed as images or classes without a word."""
    with pytest.raises(ConfigError, match=r"may be a mask|seem to be masks"):
        source(*names)
    assert len(source(*names, include=("*",))) == 2
