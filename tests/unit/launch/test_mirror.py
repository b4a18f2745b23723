"""What launch/mirror.py refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import mirror as command
from tests.support.commands import call
from tests.support.mirrored_run import make_run
from warm_dist.errors import ConfigError


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        call(command.main, tmp_path)
    make_run(tmp_path, None)
    with pytest.raises(ConfigError, match="name a server with --url"):
        call(command.main, tmp_path)
    make_run(tmp_path, "sqlite:///mlflow.db")
    with pytest.raises(ConfigError, match="tracking section"):
        call(command.main, tmp_path)
