"""Input made to hurt: refused or passed over by rule, never written anywhere, never a crash without a message."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.pack import pack
from data_pipelines.reading.loader import Loader
from data_pipelines.shards.indexed import index_shard, merge
from data_pipelines.shards.manifest import Manifest, NAME, read_manifest
from data_pipelines.sources.base import BadImage, Sample, Source
from data_pipelines.sources.open import open_source
from data_pipelines.verify import verify
from warm_dist.errors import ConfigError, DataError
from warm_dist.store.folder import FolderStore

BLOCK = tarfile.BLOCKSIZE


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A tar header and its content."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)


def checksummed(data: bytes) -> bytes:
    """Every header of a tar gets its right checksum again, so that the damage is believed."""
    out = bytearray(data)
    for start in range(0, len(out) - BLOCK + 1, BLOCK):
        header = out[start : start + BLOCK]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            out[start + 148 : start + 156] = f"{sum(header):06o}\0 ".encode()
    return bytes(out)


def with_size(header: bytes, field: bytes) -> bytes:
    """The header with other bytes in its size field, and a right checksum."""
    return checksummed(header[:124] + field.ljust(12, b"\0") + header[136:])


END = bytes(2 * BLOCK)
GOOD = member("good.png", png(1))
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
    "an extended header of absurd size": (with_size(member("x", kind=tarfile.XHDTYPE), b"%011o" % (1 << 32)), None),
    "an extended header of rubbish": (member("x", b"\xff99999 path=\n" * 5, tarfile.XHDTYPE) + member("y.png", png(4)), 2),
}  # fmt: skip


@pytest.mark.parametrize("case", TARS)
def test_hostile_tars(tmp_path: Path, case: str) -> None:
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
        manifest = pack(open_source(str(folder), 8), str(tmp_path / "out"))
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


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None], **columns: Any) -> bytes:
    """The folder's manifest with a changed header and other columns."""
    table = pq.read_table(folder / NAME)
    header = json.loads(table.schema.metadata[b"warm-dist"])
    change(header)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"warm-dist": json.dumps(header)}), buffer)
    return buffer.getvalue()


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
    change, columns, words = LIES[lie]
    (tmp_path / NAME).write_bytes(rewritten(packed[1], change, **columns))
    with pytest.raises(DataError, match=words):
        read_manifest(f"{tmp_path}/{NAME}")


def test_a_manifest_that_would_fill_the_memory(tmp_path: Path) -> None:
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


def reader(manifest: Manifest, folder: Path) -> Loader:
    store = FolderStore(folder)
    options = {"batch_size": 8, "num_lanes": 8, "seed": 0, "rank": 0, "world": 1, "chunk": 4, "window": 8}
    return Loader(manifest, store, **options, threads=1, buffer_bytes=1 << 20)


# -- fuzzing: a few mutated inputs in every test run, tens of thousands in `make soak` ------------------------------------

Mutation = list[tuple[int, int]]
mutations = st.tuples(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=12),
    st.none() | st.integers(0, 1 << 20),
)
few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(max_examples=6000, deadline=None, suppress_health_check=list(HealthCheck))


def mutated(data: bytes, mutation: tuple[Mutation, int | None]) -> bytes:
    """Some bytes replaced, and perhaps the end cut off."""
    changes, cut = mutation
    out = bytearray(data)
    for place, value in changes:
        out[place % len(out)] = value
    return bytes(out if cut is None else out[: cut % len(out)])


def check_index(path: Path) -> None:
    found = index_shard(path, "x.tar")
    assert len(found.keys) == len(found.label)
    if found.keys:
        merge([found])


def check_source(path: Path) -> None:
    for item in open_source(str(path), 8):
        assert isinstance(item, BadImage) or item.image.shape == (8, 8, 3)


def check_manifest(path: Path) -> None:
    with closing(reader(read_manifest(str(path)), path.parent)) as loader:
        assert loader.read(np.arange(len(loader.manifest.key))).shape[1:] == (3, 8, 8)


def sample_tar() -> bytes:
    return b"".join(member(f"{n}.png", png(n)) + member(f"{n}.cls", b"1") for n in range(4)) + END


def sample_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"{number % 2}/{number}.png", png(number))
    return buffer.getvalue()


def sample_parquet() -> bytes:
    buffer = io.BytesIO()
    rows = pa.table({"image": [{"bytes": png(n), "path": ""} for n in range(4)], "label": [0, 1, 0, 1]})
    pq.write_table(rows, buffer, row_group_size=2)
    return buffer.getvalue()


def sample_cifar() -> bytes:
    from tests.test_archives import cifar

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in cifar("10-python", 1)[0].items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def gzipped(data: bytes) -> bytes:
    packer = zlib.compressobj(level=1, wbits=31)
    return packer.compress(data) + packer.flush()


def same(data: bytes) -> bytes:
    return data


FUZZED: dict[str, tuple[str, Callable[[], bytes], Callable[[bytes], bytes], Callable[[Path], None]]] = {
    "index": ("x.tar", sample_tar, checksummed, check_index),
    "tar": ("x.tar", sample_tar, checksummed, check_source),
    "zip": ("x.zip", sample_zip, same, check_source),
    "parquet": ("x.parquet", sample_parquet, same, check_source),
    "cifar": ("x.tar.gz", sample_cifar, gzipped, check_source),
}


def survives(check: Callable[[Path], None], path: Path) -> None:
    """Anything but our own errors propagates."""
    with suppress(DataError, ConfigError):
        check(path)


def fuzz(folder: Path, kind: str, effort: settings) -> None:
    name, sample, finish, check = FUZZED[kind]
    good = sample()
    (folder / name).write_bytes(finish(good))
    check(folder / name)  # what is mutated is good to begin with

    @effort
    @given(mutations)
    def attack(mutation: tuple[Mutation, int | None]) -> None:
        (folder / name).write_bytes(finish(mutated(good, mutation)))
        survives(check, folder / name)

    attack()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def fuzz_manifest(packed: Path, folder: Path, effort: settings) -> None:
    """Bytes of the file, and values of the header."""
    shutil.copytree(packed, folder / "data", dirs_exist_ok=True)
    path = folder / "data" / NAME
    good = path.read_bytes()
    check_manifest(path)

    @effort
    @given(mutations, st.lists(st.tuples(st.integers(0, 1000), json_values), max_size=2))
    def attack(mutation: tuple[Mutation, int | None], values: list[tuple[int, Any]]) -> None:
        def change(header: dict[str, Any]) -> None:
            for place, value in values:
                owner: Any = (header, header["info"], header["shards"][place % 3])[place % 3]
                owner[list(owner)[place % len(owner)]] = value

        try:
            data = rewritten(packed, change) if values else mutated(good, mutation)
        except (TypeError, AttributeError, KeyError, IndexError):  # a header of which the first value left nothing
            return
        path.write_bytes(data)
        survives(check_manifest, path)

    attack()


@pytest.mark.parametrize("kind", FUZZED)
def test_mutated_files(tmp_path: Path, kind: str) -> None:
    fuzz(tmp_path, kind, few)


def test_mutated_manifests(packed: tuple[Manifest, Path], tmp_path: Path) -> None:
    fuzz_manifest(packed[1], tmp_path, few)


@pytest.mark.soak
@pytest.mark.parametrize("kind", FUZZED)
def test_mutated_files_for_long(tmp_path: Path, kind: str) -> None:
    fuzz(tmp_path, kind, many)


@pytest.mark.soak
def test_mutated_manifests_for_long(packed: tuple[Manifest, Path], tmp_path: Path) -> None:
    fuzz_manifest(packed[1], tmp_path, many)
