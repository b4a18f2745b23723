"""What the services on loopback refuse before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import services
from warm_dist.errors import OutputError


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="file/runs: cannot be written"),
        services.services(tmp_path / "file" / "runs"),
    ):
        pass
