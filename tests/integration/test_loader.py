"""The reader over a real S3."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.pack import pack
from data_pipelines.sources.open import open_source
from tests.support.packed import Packed
from tests.support.reading import equal, take
from warm_dist.store.folder import FolderStore
from warm_dist.store.open import open_store


def test_s3_gives_the_batches_of_a_folder(digits: Packed, tmp_path: Path) -> None:
    manifest = pack(open_source("digits", 8), str(tmp_path), shard_size=500)
    assert manifest.info.fingerprint == digits.manifest.info.fingerprint
    ours = take(digits.manifest, open_store(digits.url, digits.endpoint_url), 0, 57)
    assert all(equal(one, other) for one, other in zip(ours, take(manifest, FolderStore(tmp_path), 0, 57), strict=True))
