"""Every damage of a packed data set is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines import verify as verify_module
from data_pipelines.pack import pack
from data_pipelines.shards.manifest import NAME
from tests.support.commands import call
from tests.support.packing import noise_source
from warm_dist.errors import DataError


def test_verify_lists_every_damage(tmp_path: Path) -> None:
    manifest = pack(noise_source(21), str(tmp_path), shard_size=8)
    path = tmp_path / manifest.shards[1].name
    data = bytearray(path.read_bytes())
    data[manifest.offset[9] + 200] ^= 1
    path.write_bytes(data)
    (tmp_path / manifest.shards[2].name).unlink()
    with pytest.raises(DataError, match="3 damages") as caught:
        call(verify_module.main, f"{tmp_path}/{NAME}", "--workers", 1)
    assert f"image '{manifest.key[9]}' in shard {path.name}: crc32 differs" in str(caught.value)
    assert f"shard {path.name}: sha256 differs" in str(caught.value)
    assert f"{manifest.shards[2].name}: does not exist" in str(caught.value)
