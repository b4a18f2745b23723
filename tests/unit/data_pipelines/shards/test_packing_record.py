"""What a packing leaves of each shard, to be gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.pack import Packing
from tests.support.packing import noise_source
from warm_dist.errors import DataError


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    packing = Packing(noise_source(8), str(tmp_path), shard_size=4)
    packing.run()
    record = next((tmp_path / "parts").rglob("*.npz"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{record.name}: is damaged .* delete it"):
        packing.finish()
    record.unlink()
    assert packing.run() == 0
    assert packing.finish().info.num_images == 8
