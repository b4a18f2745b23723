"""What the services on loopback refuse before anything starts."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import services
from warm_dist.errors import OutputError, UnreachableError


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="file/runs: cannot be written"),
        services.services(tmp_path / "file" / "runs"),
    ):
        pass


@pytest.mark.parametrize(("code", "patience_s"), [(1, 120.0), (None, -1.0)], ids=["dead", "hanging"])
def test_a_server_that_died_or_hangs_is_not_waited_for(
    code: int | None, patience_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a server that died at its start is waited for for two minutes, or one that hangs for ever."""

    def refuse(*_: Any, **options: Any) -> None:
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(services, "START_S", patience_s)
    waits = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: pytest.fail("it is waited for"))
    monkeypatch.setattr(services, "time", waits)
    (tmp_path / "log").write_text("no such database")
    process: Any = SimpleNamespace(poll=lambda: code)
    with pytest.raises(UnreachableError, match=r"did not start \(refused\); .*ends:\n  no such database"):
        services._wait_until_healthy("http://127.0.0.1:9", process, tmp_path / "log")


def test_other_servers_credentials_do_not_reach_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a session token or a profile in the user's environment makes the embedded S3 refuse the quickstart."""
    monkeypatch.setattr(
        services.os, "environ", {"HOME": "h", "AWS_SESSION_TOKEN": "t", "AWS_PROFILE": "p", "MLFLOW_X": "x"}
    )
    ours: Any = SimpleNamespace(env={"AWS_ACCESS_KEY_ID": "k"})
    services.Services(ours, "http://127.0.0.1:9", ours).adopt()
    assert services.os.environ == {"HOME": "h", "AWS_ACCESS_KEY_ID": "k"}
