"""The manifest: written, read back, and refused when it lies."""

from __future__ import annotations

import dataclasses
import io
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.pack import pack
from data_pipelines.shards.manifest import (
    _TYPES,
    NAME,
    Manifest,
    _Damage,
    _header,
    _parse,
    read_manifest,
    write_manifest,
)
from data_pipelines.shards.payload import decode
from tests.support.packing import contents, noise_source
from warm_dist.errors import DataError
from warm_dist.store.open import open_store


def test_manifest_survives_the_round_trip_and_places_every_payload(tmp_path: Path) -> None:
    source = noise_source(21)
    written = pack(source, str(tmp_path), shard_size=8)
    read = read_manifest(f"{tmp_path}/{NAME}")
    assert read.info.fingerprint == written.info.fingerprint == contents(tmp_path)[NAME]
    for field in dataclasses.fields(written):
        if field.name != "info":
            assert np.array_equal(getattr(read, field.name), getattr(written, field.name)), field.name
    for field in dataclasses.fields(written.info):
        assert np.array_equal(getattr(read.info, field.name), getattr(written.info, field.name)), field.name
    assert [shard.num_images for shard in read.shards] == [8, 8, 5]
    assert read.class_names == ("a", "b", "c")
    assert read.attribution == "made up"
    for row, sample in enumerate(source):
        data = (tmp_path / read.shards[read.shard[row]].name).read_bytes()
        payload = data[read.offset[row] : read.offset[row] + read.length[row]]
        assert np.array_equal(decode(payload), sample.image)
        assert read.label[row] == sample.label


def test_manifests_that_lie_are_refused(tmp_path: Path) -> None:
    good = pack(noise_source(21), str(tmp_path), shard_size=8)
    store = open_store(str(tmp_path / "lies"))
    broken_label, outside = good.label.copy(), good.offset.copy()
    broken_label[4], outside[20] = 3, 10**9
    for change, words in (
        ({"label": broken_label}, "labels from 0 to 3"),
        ({"offset": outside}, "places image '00000020-folder-v2-n20-png' in shard .* outside"),
        ({"shards": good.shards[:2]}, "shard by shard"),
        ({"info": dataclasses.replace(good.info, sigma_data=math.nan)}, "not finite"),
        ({"info": dataclasses.replace(good.info, sigma_data=0.9)}, "sigma_data 0.9"),
        ({"info": dataclasses.replace(good.info, num_images=22)}, "header counts 22"),
    ):
        with pytest.raises(DataError, match=words):
            write_manifest(store, dataclasses.replace(good, **change))
    data = (tmp_path / NAME).read_bytes()
    table = pq.read_table(tmp_path / NAME)
    header = table.schema.metadata[b"warm-dist"]

    def parquet(table: pa.Table) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()

    newer = header.replace(b'"version": 3', b'"version": 9')
    old = header.replace(b'"version": 3', b'"version": 2')
    endless = old.replace(b'"num_classes": 3', b'"num_classes": %d' % 10**15)
    halved = header[: len(header) // 2]
    for damaged, words in (
        (data[:-100], "not a readable Parquet"),
        (b"", "not a readable Parquet"),
        (parquet(table.replace_schema_metadata({"warm-dist": newer})), "version 9, this program reads 2 and 3"),
        (parquet(table.replace_schema_metadata({"warm-dist": halved})), "damaged header"),
        (
            parquet(table.replace_schema_metadata({"warm-dist": endless})),
            f"names 3 classes, its header counts {10**15}",
        ),
        (parquet(table.replace_schema_metadata({})), "no warm-dist header"),
        (parquet(table.drop_columns(["crc32"])), "'crc32': 'missing'"),
        (parquet(table[:20].replace_schema_metadata({"warm-dist": old})), "has 20 rows, its header counts 21"),
    ):
        store.write(NAME, damaged)
        with pytest.raises(DataError, match=words):
            read_manifest(f"{store.url}/{NAME}")


def _same(one: Manifest, other: Manifest) -> bool:
    return _header(one) == _header(other) and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in _TYPES)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Fault: a flipped bit of the manifest changes labels, keys or statistics, and nothing says so."""
    pack(noise_source(21, size=4), str(tmp_path), shard_size=8)
    data = (tmp_path / NAME).read_bytes()
    good, certified = _parse(data)
    assert certified
    bits, refused = random.Random(0).sample(range(8 * len(data)), 600), 0
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            manifest, certified = _parse(bytes(flipped))
            assert certified
            assert _same(manifest, good)
        except _Damage:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("column", _TYPES)
def test_another_value_in_any_column_is_found(tmp_path: Path, column: str) -> None:
    pack(noise_source(21, size=4), str(tmp_path), shard_size=8)
    table = pq.read_table(tmp_path / NAME)
    values = table[column].to_pylist()
    values[3], values[4] = values[4], values[3]
    values[5] = values[3] if column != "key" else values[5] + "x"
    values = values if values != table[column].to_pylist() else [1, *values[1:]]
    changed = table.set_column(
        table.schema.get_field_index(column),
        table.schema.field(column),
        pa.array(values, table.schema.field(column).type),
    )
    pq.write_table(changed, tmp_path / NAME)
    with pytest.raises(DataError, match="another sha256"):
        read_manifest(f"{tmp_path}/{NAME}")


def test_one_of_an_older_version_is_read_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(noise_source(21, size=4), str(tmp_path), shard_size=8)
    table = pq.read_table(tmp_path / NAME)
    header = table.schema.metadata[b"warm-dist"]
    for version, told in ((b"3", "another sha256"), (b"2", None)):
        old = header.replace(b'"version": 3', b'"version": ' + version)
        pq.write_table(table.replace_schema_metadata({"warm-dist": old}), tmp_path / NAME)
        if told:
            with pytest.raises(DataError, match=told):
                read_manifest(f"{tmp_path}/{NAME}")
        else:
            assert read_manifest(f"{tmp_path}/{NAME}").info.num_images == 21
    assert capsys.readouterr().err.count("has no digest, since an older version wrote it") == 1
