"""CIFAR's archives; a hostile pickle does nothing but fail."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.sources import cifar as cifar_module
from data_pipelines.sources.open import open_source
from tests.support.cifar import cifar, python2
from tests.support.pictures import encode, good, noise
from warm_dist.errors import ConfigError, DataError


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["10-python", "10-binary", "100-python", "100-binary"])
def test_cifar_in_all_its_archives(tmp_path: Path, kind: str) -> None:
    """Fault: colour planes are read as interleaved pixels, or CIFAR-100's coarse classes as its labels."""
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
        with pytest.raises(DataError, match=r"not a CIFAR-10 or CIFAR-100 archive .*is refused"):
            open_source(str(path), 32)
    assert not (tmp_path / "hacked").exists()


def test_what_is_no_cifar(tmp_path: Path) -> None:
    """Fault: an archive that lacks a batch, or is not of CIFAR at all, ends in a KeyError or is packed in part."""
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


def test_an_archive_that_unpacks_to_more_than_cifar_is_left_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: 14 MB of zeros' gzip, in one member or as a name's header, fill 4 GB of memory."""
    monkeypatch.setattr(cifar_module, "_CIFAR_BYTES", 1 << 20)
    path = write_tar(tmp_path / "cifar.tar.gz", {"a": bytes(600_000), "b": bytes(600_000)}, "w:gz")
    long_name = tarfile.TarInfo("x" * (2 << 20)).tobuf(tarfile.GNU_FORMAT)
    for content in (path.read_bytes(), gzip.compress(long_name)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not CIFAR's: unpacks to more than 1 MB"):
            open_source(str(path), 32)
