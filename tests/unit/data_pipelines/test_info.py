"""`info` says what is there."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_pipelines import info
from tests.support.commands import call
from tests.support.packed import Packed
from warm_dist.errors import DataError


def test_info_in_words_and_as_json(digits: Packed, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: counts of images, classes or bytes that differ from the manifest's."""
    assert call(info.main, digits.manifest_url) == 0
    text = capsys.readouterr().out
    assert "1,797, 8 x 8 x 1" in text
    assert "174 to 183 images each: 0, 1, 2, 3, 4, … 9" in text
    assert digits.manifest.info.fingerprint in text
    assert "npy, 192 bytes an image" in text  # 128 of header, 64 pixels
    assert call(info.main, digits.manifest_url, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 1797
    assert facts["class_names"] == list("0123456789")
    assert facts["images_per_class"] == [174, 183]
    assert facts["bytes"] == sum(shard.size_bytes for shard in digits.manifest.shards)
    assert np.isclose(facts["sigma_data"], digits.manifest.info.sigma_data)
    with pytest.raises(DataError, match=r"nothing\.parquet: does not exist"):
        call(info.main, f"{digits.url}/nothing.parquet")
