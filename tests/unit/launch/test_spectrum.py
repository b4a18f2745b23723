"""launch/spectrum.py: its picture, its numbers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from launch import spectrum
from tests.support.commands import call
from tests.support.packed import Packed
from tests.support.paths import ROOT
from warm_dist.config.run import load_config
from warm_dist.errors import ConfigError, DataError, OutputError


def test_command_writes_picture_and_numbers(digits: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: the printed --set line is not the path in the JSON file, or no config takes it."""
    assert call(spectrum.main, digits.manifest_url, "--out", tmp_path / "a" / "b", "--bnr", 0, 0.5, 2) == 0
    tree = json.loads((tmp_path / "a" / "b" / "spectrum.json").read_text())
    assert [row["bnr"] for row in tree["bnr"]] == [0, 0.5, 2]
    assert max(tree["bnr"][0]["price"]) == pytest.approx(1)
    assert Image.open(tmp_path / "a" / "b" / "spectrum.png").size == (1600, 900)
    line = next(line for line in capsys.readouterr().out.splitlines() if "table" in line)
    config = load_config(ROOT / "configs" / "quickstart.json", [line.strip().removeprefix("--set ").strip("'")])
    assert config.process.bnr.model_dump(mode="json") == tree["suggested_path"]  # what it prints is what --set takes


def test_command_refuses_what_it_cannot_use(digits: Packed, tmp_path: Path) -> None:
    """Fault: a negative BNR or NaN is drawn, or a missing file ends in a library's own exception."""
    for words, kind, told in [
        ([digits.manifest_url, "--bnr", *range(9)], ConfigError, "at most 8"),
        ([tmp_path / "absent" / "manifest.parquet"], DataError, "absent"),
        ([digits.manifest_url, "--out", f"{digits.manifest_url}/x"], OutputError, "cannot be made"),
    ]:
        with pytest.raises(kind, match=told):
            call(spectrum.main, "--out", tmp_path / "out", *words)
