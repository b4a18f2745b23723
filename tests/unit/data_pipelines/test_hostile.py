"""Input made to hurt: refused or passed over by rule, never written anywhere, never a crash without a message."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.pack import pack
from data_pipelines.shards.indexed import index_shard
from data_pipelines.shards.manifest import NAME, Manifest, read_manifest
from data_pipelines.sources.base import Sample, Source
from data_pipelines.sources.listing import Choice
from data_pipelines.sources.open import open_source
from data_pipelines.verify import verify
from tests.support.hostile import END, checksummed, member, pixels, png, reader, rewritten
from warm_dist.errors import DataError


def with_size(header: bytes, field: bytes) -> bytes:
    """The header with other bytes in its size field, and a right checksum."""
    return checksummed(header[:124] + field.ljust(12, b"\0") + header[136:])


GOOD = member("good.png", png(1))
RUBBISH = member("x", b"\xff99999 path=\n" * 5, tarfile.XHDTYPE) + member("y.png", png(4))


def reads_on() -> bool:
    """Whether this Python's tarfile skips such a header; newer releases stop there, and the tar is refused."""
    with tarfile.open(fileobj=io.BytesIO(GOOD + RUBBISH + END)) as tar:
        return len(tar.getmembers()) == 2


TARS = {
    "names that climb": (member("../../up.png", png(2)) + member("/etc/root.png", png(3)), 3),
    "links": (member("l.png", kind=tarfile.SYMTYPE, link="/etc/passwd") + member("h.png", kind=tarfile.LNKTYPE, link="good.png"), 1),
    "devices": (b"".join(member(f"{kind!r}.png", kind=kind) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)), 1),
    "a folder": (member("folder.png", kind=tarfile.DIRTYPE), 1),
    "a size beyond the file": (with_size(member("x.png"), b"%011o" % (1 << 32)), None),
    "an absurd size": (with_size(member("x.png"), b"\x80" + (1 << 62).to_bytes(11, "big")), None),
    "a negative size": (with_size(member("x.png"), b"\xff" * 12), None),
    "a size that is no number": (with_size(member("x.png"), b"12x45"), None),
    "a name that is only dots": (member("....png", png(2)), 1),
    "an extended header of rubbish": (RUBBISH, 2 if reads_on() else None),
    "an extended header of absurd size": (with_size(member("x", kind=tarfile.XHDTYPE), b"%011o" % (1 << 32)), None),
}  # fmt: skip


@pytest.mark.parametrize("case", TARS)
def test_hostile_tars(tmp_path: Path, case: str) -> None:
    """Fault: a link or a device counts as a picture, a name writes outside the folder, or a huge size is believed."""
    content, images = TARS[case]
    folder = tmp_path / "deep" / "in"
    folder.mkdir(parents=True)
    (folder / "x.tar").write_bytes(GOOD + content + END)
    if images is None:
        with pytest.raises(DataError, match=r"x\.tar: (truncated|not a readable tar)"):
            index_shard(folder / "x.tar", "x.tar")
        with pytest.raises(DataError, match=r"x\.tar: (truncated|not a readable tar)"):
            open_source(str(folder), 8)
    else:
        assert len(index_shard(folder / "x.tar", "x.tar").keys) == images
        manifest = pack(open_source(str(folder), 8, choice=Choice(classes="none")), str(tmp_path / "out"))
        assert len(manifest.key) == images
        assert all(".." not in key and "/" not in key for key in manifest.key)
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert written <= {"deep", "out"}
    assert list((tmp_path / "deep").rglob("*")) == [folder, folder / "x.tar"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    folder = tmp_path_factory.mktemp("packed")
    source = Source(
        40, ("a", "b"), "", lambda start, stop: [Sample(f"{n}", n % 2, pixels(n)) for n in range(start, stop)]
    )
    return pack(source, str(folder), shard_size=15, payload="png"), folder


def set_shard(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["shards"][0].update({name: value})


def set_info(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["info"].update({name: value})


def nothing(header: dict[str, Any]) -> None:
    pass


LIES: dict[str, tuple[Callable[[dict[str, Any]], None], dict[str, Any], str]] = {
    "a shard above the folder": (set_shard("name", "../x.tar"), {}, "must be different files of its folder"),
    "a shard anywhere": (set_shard("name", "/etc/passwd"), {}, "must be different files of its folder"),
    "one shard twice": (lambda h: h["shards"][1].update(name=h["shards"][0]["name"]), {}, "names the shards twice"),
    "a shard without end": (set_shard("num_images", 10**13), {}, "as many as the header counts"),
    "fewer than none": (set_shard("num_images", -15), {}, "as many as the header counts"),
    "an offset that overflows": (nothing, {"offset": np.full(40, 2**63 - 8)}, "outside of it"),
    "lengths that overflow": (nothing, {"length": np.full(40, 2**63 - 1)}, "outside of it"),
    "a length of nothing": (nothing, {"length": np.zeros(40, np.int64)}, "outside of it"),
    "one place for all": (nothing, {"offset": np.zeros(40, np.int64)}, "overlap"),
    "a vast image": (set_info("resolution", 10**9), {}, "damaged header"),
    "no image": (set_info("resolution", 0), {}, "damaged header"),
    "many channels": (set_info("channels", 7), {}, "damaged header"),
    "a text for a number": (set_info("num_images", "many"), {}, "damaged header"),
    "classes without names": (set_info("num_classes", 10**9), {}, "names 2 classes"),
    "a header that is a list": (lambda h: h.clear(), {}, "damaged header"),
    "keys that are numbers": (nothing, {"key": np.arange(40)}, "has columns"),
    "wide numbers": (nothing, {"shard": np.zeros(40, np.int64)}, "has columns"),
    "an empty cell": (nothing, {"label": [None, *range(39)]}, "empty cells"),
}


@pytest.mark.parametrize("lie", LIES)
def test_hostile_manifests(packed: tuple[Manifest, Path], tmp_path: Path, lie: str) -> None:
    """Fault: a manifest reads files outside its folder, or its numbers are used before they are checked."""
    change, columns, words = LIES[lie]
    (tmp_path / NAME).write_bytes(rewritten(packed[1], change, **columns))
    with pytest.raises(DataError, match=words):
        read_manifest(f"{tmp_path}/{NAME}")


def test_a_manifest_that_would_fill_the_memory(tmp_path: Path) -> None:
    """Fault: the table is unpacked before its number of rows is compared with the size of the file."""
    rows = pa.array(np.zeros(1 << 22, np.int32))
    pq.write_table(pa.table({"shard": rows}), tmp_path / NAME, compression="zstd")
    assert (tmp_path / NAME).stat().st_size < 1 << 20
    with pytest.raises(DataError, match=r"claims 4194304 rows in \d+ bytes"):
        read_manifest(f"{tmp_path}/{NAME}")


def test_offsets_that_lie_inside_the_shard_are_found_by_the_crc(packed: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, folder = packed
    shutil.copytree(folder, tmp_path / "copy")
    offset = manifest.offset.copy()
    offset[3] += 1
    (tmp_path / "copy" / NAME).write_bytes(rewritten(folder, nothing, offset=offset))
    lying = read_manifest(f"{tmp_path}/copy/{NAME}")
    words = f"image '{manifest.key[3]}' in shard {manifest.shards[0].name}: .*crc32"
    with closing(reader(lying, tmp_path / "copy")) as loader, pytest.raises(DataError, match=words):
        loader.read(np.arange(40))
    assert any("crc32 differs" in line for found in verify(lying, str(tmp_path / "copy")) for line in found)
