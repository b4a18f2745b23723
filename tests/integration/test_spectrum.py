"""launch/spectrum.py towards an MLflow server that is away."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import spectrum
from tests.support.commands import call
from tests.support.processes import free_port
from tests.support.sweeps import pack_digits
from warm_dist.errors import UnreachableError


def test_a_server_that_is_away_is_told_once_the_picture_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    words = [pack_digits(tmp_path), "--out", tmp_path / "out", "--mlflow-url", f"http://127.0.0.1:{free_port()}"]
    with pytest.raises(UnreachableError, match="MLflow at"):
        call(spectrum.main, *words)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"spectrum.png", "spectrum.json"}
