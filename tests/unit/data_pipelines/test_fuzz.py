"""Mutated input: a few in every test run, tens of thousands in make soak; only our own errors come out."""

from __future__ import annotations

import io
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

from data_pipelines.pack import pack
from data_pipelines.shards.indexed import index_shard, merge
from data_pipelines.shards.manifest import NAME, Manifest, read_manifest
from data_pipelines.sources.base import BadImage, Sample, Source
from data_pipelines.sources.open import open_source
from tests.support.hostile import END, checksummed, member, pixels, png, reader, rewritten
from warm_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    folder = tmp_path_factory.mktemp("packed")
    source = Source(
        40, ("a", "b"), "", lambda start, stop: [Sample(f"{n}", n % 2, pixels(n)) for n in range(start, stop)]
    )
    return pack(source, str(folder), shard_size=15, payload="png"), folder


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
    from tests.support.cifar import cifar

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
    """Fault: a damaged tar, zip, Parquet or pickle ends in a KeyError or struct.error in place of a DataError."""
    fuzz(tmp_path, kind, few)


def test_mutated_manifests(packed: tuple[Manifest, Path], tmp_path: Path) -> None:
    """Fault: a header with a value of an unexpected type ends in a TypeError in place of a DataError."""
    fuzz_manifest(packed[1], tmp_path, few)


@pytest.mark.soak
@pytest.mark.parametrize("kind", FUZZED)
def test_mutated_files_for_long(tmp_path: Path, kind: str) -> None:
    """Fault: that of test_mutated_files, in a place that 25 mutations miss."""
    fuzz(tmp_path, kind, many)


@pytest.mark.soak
def test_mutated_manifests_for_long(packed: tuple[Manifest, Path], tmp_path: Path) -> None:
    """Fault: that of test_mutated_manifests, in a place that 25 mutations miss."""
    fuzz_manifest(packed[1], tmp_path, many)
