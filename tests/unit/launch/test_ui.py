"""What launch/ui.py refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import ui
from tests.support.commands import call
from warm_dist.errors import ConfigError


def test_ui_without_data_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run make quickstart first"):
        call(ui.main, "--root", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
