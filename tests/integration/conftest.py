"""What integration tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.packed import Packed
from tests.support.training import digits_config


@pytest.fixture(scope="session")
def config_file(digits: Packed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 20 small steps on digits that lie on S3."""
    return digits_config(tmp_path_factory.mktemp("config"), digits)
