"""Tars and CIFAR's archives as sources; a hostile pickle does nothing but fail."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.pack import pack
from data_pipelines.sources.base import Sample, Source
from data_pipelines.sources.open import open_source
from warm_dist.errors import ConfigError, DataError


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def good(source: Source) -> list[Sample]:
    return [item for item in source if isinstance(item, Sample)]


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_tar_of_class_folders(tmp_path: Path) -> None:
    members = {f"wrapped/{name}.png": encode(noise(n)) for n, name in enumerate(("zebra/b", "zebra/a", "ant/x"))}
    source = open_source(str(write_tar(tmp_path / "a.tar", members | {"wrapped/readme.txt": b"hello"})), 8)
    assert source.class_names == ("ant", "zebra")
    assert [(item.key, item.label) for item in good(source)] == [
        ("wrapped/ant/x.png", 0),
        ("wrapped/zebra/a.png", 1),
        ("wrapped/zebra/b.png", 1),
    ]
    assert np.array_equal(good(source)[2].image, noise(0))


def test_webdataset_shards_are_packed_again(tmp_path: Path) -> None:
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
    assert pack(source, str(tmp_path / "out"), workers=2, shard_size=5).info.num_images == 12


def test_tars_that_cannot_be_packed(tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match=r"b\.tar: the picture 'a\.png' occurs twice"):
        open_source(str(tmp_path), 8)


def python2(tree: dict[str, object]) -> bytes:
    """As CIFAR's authors wrote it: protocol 2, numpy's old module, byte strings for keys and pixels."""
    data = pickletools.optimize(pickle.dumps({key.encode(): value for key, value in tree.items()}, protocol=2))
    return data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar(kind: str, count: int = 4) -> tuple[dict[str, bytes], np.ndarray, list[int], list[str]]:
    """The members of an archive, and what is in it: (N, 32, 32, 3) images, labels, names."""
    number = int(kind.partition("-")[0])
    batches = 5 if number == 10 else 1
    pixels = np.random.default_rng(0).integers(0, 256, (batches * count, 3072), np.uint8)
    labels = [(7 * n) % number for n in range(batches * count)]
    names = [f"class_{n}" for n in range(number)]
    members = {}
    for batch in range(batches):
        rows, marks = pixels[batch * count : (batch + 1) * count], labels[batch * count : (batch + 1) * count]
        name = f"data_batch_{batch + 1}" if number == 10 else "train"
        if kind.endswith("python"):
            key = "labels" if number == 10 else "fine_labels"
            members[f"cifar/{name}"] = python2({"data": rows, key: marks, "batch_label": b"one"})
        else:
            coarse = b"" if number == 10 else b"\7"
            members[f"cifar/{name}.bin"] = b"".join(
                coarse + bytes([mark]) + row.tobytes() for mark, row in zip(marks, rows, strict=True)
            )
    if kind.endswith("python"):
        key = "label_names" if number == 10 else "fine_label_names"
        members["cifar/batches.meta" if number == 10 else "cifar/meta"] = python2({key: [n.encode() for n in names]})
        members["cifar/test_batch" if number == 10 else "cifar/test"] = b"not read"
    else:
        text = "\n".join(names).encode() + b"\n\n"
        members["cifar/batches.meta.txt" if number == 10 else "cifar/fine_label_names.txt"] = text
    return members, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, names


@pytest.mark.parametrize("kind", ["10-python", "10-binary", "100-python", "100-binary"])
def test_cifar_in_all_its_archives(tmp_path: Path, kind: str) -> None:
    members, images, labels, names = cifar(kind)
    path = write_tar(tmp_path / f"cifar-{kind}.tar.gz", members, "w:gz")
    source = open_source(str(path), 32)
    assert source.class_names == tuple(names)
    assert f"CIFAR-{len(names)} (Krizhevsky" in source.attribution
    assert [item.label for item in good(source)] == labels
    assert np.array_equal(np.stack([item.image for item in good(source)]), images)
    half = np.stack([item.image for item in good(open_source(str(path), 16))])
    assert np.abs(half - images.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))).max() <= 1
    assert len(list(pickle.loads(pickle.dumps(source.part(1, 3))))) == 2


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hacked",)


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    members, *_ = cifar("10-python")
    for evil in (
        pickle.dumps(Hostile()),
        pickle.dumps({b"data": Hostile()}, protocol=2),
        b'cbuiltins\neval\n(S\'open("hacked", "w")\'\ntR.',
        b"cnumpy\nload\n(S'hacked'\ntR.",
    ):
        members["cifar/data_batch_3"] = evil
        path = write_tar(tmp_path / "cifar.tar.gz", members, "w:gz")
        with pytest.raises(DataError, match=r"not CIFAR-10's or CIFAR-100's archive .*is refused"):
            open_source(str(path), 32)
    assert not (tmp_path / "hacked").exists()


def test_what_is_no_cifar(tmp_path: Path) -> None:
    members, *_ = cifar("10-python")
    cases: dict[str, dict[str, bytes]] = {
        "images": {"a/b.png": encode(noise(0))},
        "a batch is missing": {name: data for name, data in members.items() if not name.endswith("batch_4")},
        "a pickle broken off": members | {"cifar/data_batch_1": members["cifar/data_batch_1"][:500]},
        "labels beyond the classes": members | {"cifar/batches.meta": python2({"label_names": [b"one"]})},
        "a list": members | {"cifar/batches.meta": pickle.dumps([1, 2])},
        "no array": members | {"cifar/data_batch_1": python2({"data": [1, 2], "labels": [1, 2]})},
        "too many files": {f"{number}": b"" for number in range(200)},
    }
    for files in cases.values():
        with pytest.raises(DataError, match=r"cifar\.tar\.gz: not"):
            open_source(str(write_tar(tmp_path / "cifar.tar.gz", files, "w:gz")), 32)
    with pytest.raises(ConfigError, match="no such source"):
        open_source(str(tmp_path / "cifar.tar.xz"), 32)
