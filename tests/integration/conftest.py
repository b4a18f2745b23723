"""What integration tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.services import Services, services
from tests.support.packed import Packed
from tests.support.training import digits_config
from warm_dist.tracking.client import CLIENT_ENV


@pytest.fixture(scope="session")
def config_file(digits: Packed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 20 small steps on digits that lie on S3."""
    return digits_config(tmp_path_factory.mktemp("config"), digits)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """MLflow and the S3 behind it; each test takes an experiment of its own."""
    with services(tmp_path_factory.mktemp("services")) as servers:
        yield servers


@pytest.fixture
def client(running: Services, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of that MLflow, in an environment as the mirror has it."""
    for name, value in CLIENT_ENV.items():
        monkeypatch.setenv(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=running.mlflow_url)
