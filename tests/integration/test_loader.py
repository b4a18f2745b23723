"""The reader over a real S3."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.pack import pack
from data_pipelines.sources.open import open_source
from tests.support.packed import Packed
from tests.support.reading import equal, loader, take
from warm_dist.errors import DataError
from warm_dist.store.folder import FolderStore
from warm_dist.store.open import open_store


def test_s3_gives_the_batches_of_a_folder(digits: Packed, tmp_path: Path) -> None:
    manifest = pack(open_source("digits", 8), str(tmp_path), shard_size=500)
    assert manifest.info.fingerprint == digits.manifest.info.fingerprint
    ours = take(digits.manifest, open_store(digits.url, digits.endpoint_url), 0, 57)
    assert all(equal(one, other) for one, other in zip(ours, take(manifest, FolderStore(tmp_path), 0, 57), strict=True))


def test_a_shard_replaced_on_s3_during_training(digits: Packed) -> None:
    """Fault: a range read without its shard's ETag, which mixes two versions of the shard."""
    source, target = open_store(digits.url, digits.endpoint_url), open_store(digits.url + "-copy", digits.endpoint_url)
    for shard in digits.manifest.shards:
        target.write(shard.name, source.read(shard.name))
    name = digits.manifest.shards[0].name
    with closing(loader(digits.manifest, target)) as reader:
        reader.read(np.array([3]))
        target.write(name, source.read(name)[:-1] + b"\1")
        with pytest.raises(DataError, match=f"{name}: was replaced"):
            reader.read(np.array([3]))
        target.delete(name)
        with pytest.raises(DataError, match=f"{name}: does not exist"):
            list(reader.batches(0))
