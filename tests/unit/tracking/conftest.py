"""A run to mirror."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.mirrored_run import make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder at its first attempt, nothing logged yet."""
    return make_run(tmp_path / "run", "http://user:hunter2@127.0.0.1:1/?token=hunter2")
