"""`info` says what is there."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_pipelines import info
from warm_dist.errors import DataError

if TYPE_CHECKING:
    from tests.conftest import Packed


def test_info_in_words_and_as_json(
    digits: Packed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["info", digits.manifest_url, "--endpoint-url", digits.endpoint_url]
    monkeypatch.setattr(sys, "argv", arguments)
    assert info.main() == 0
    text = capsys.readouterr().out
    assert "1,797, 8 x 8 x 1" in text
    assert "174 to 183 images each: 0, 1, 2, 3, 4, … 9" in text
    assert digits.manifest.info.fingerprint in text
    assert "npy, 192 bytes an image" in text  # 128 of header, 64 pixels
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    assert info.main() == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 1797
    assert facts["class_names"] == list("0123456789")
    assert facts["images_per_class"] == [174, 183]
    assert facts["bytes"] == sum(shard.size_bytes for shard in digits.manifest.shards)
    assert np.isclose(facts["sigma_data"], digits.manifest.info.sigma_data)
    monkeypatch.setattr(sys, "argv", ["info", digits.url + "/nothing.parquet", "--endpoint-url", digits.endpoint_url])
    with pytest.raises(DataError, match=r"nothing\.parquet: does not exist"):
        info.main()
