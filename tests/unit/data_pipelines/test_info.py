"""`info` says what is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import info
from data_pipelines.pack import pack
from data_pipelines.shards.manifest import NAME
from data_pipelines.sources.open import open_source
from tests.support.commands import call
from tests.support.packed import Packed
from tests.support.packing import png
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


def test_info_shows_what_the_listing_told_in_printable_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: nobody knows later what was left out; or a class name moves the cursor."""
    for name in ("\x1b[2Jant", "bee"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.png").write_bytes(png(len(name)))
    (tmp_path / "in" / "notes.txt").write_text("")
    pack(open_source(str(tmp_path / "in"), 8), str(tmp_path / "out"))
    assert call(info.main, tmp_path / "out" / NAME) == 0
    out = capsys.readouterr().out
    assert "source        images: 2 pictures of" in out
    assert "\n              left out: no pictures: 1 (1 .txt; such as 'notes.txt')\n" in out
    assert r"1 to 1 images each: \x1b[2Jant, bee" in out
    assert "\x1b" not in out
    assert call(info.main, tmp_path / "out" / NAME, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["class_names"][0] == "\x1b[2Jant"
    assert len(facts["source"]) == 3
