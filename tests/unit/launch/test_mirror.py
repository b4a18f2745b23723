"""What launch/mirror.py refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import mirror as command
from tests.support.commands import call
from tests.support.mirrored_run import make_run
from warm_dist.errors import ConfigError, OutputError


@pytest.mark.parametrize("text", [None, "", "null"])
def test_a_run_without_a_line_yet_is_said_so(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: nothing is sent, and 0 without a word looks as if everything were."""
    make_run(tmp_path, "http://127.0.0.1:9")
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert call(command.main, tmp_path) == 0
    assert "metrics.jsonl has no line yet, so nothing was sent" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its config\.json is missing, unreadable or changed"):
        call(command.main, tmp_path)
    make_run(tmp_path, None)
    with pytest.raises(ConfigError, match="name a server with --url"):
        call(command.main, tmp_path)
    make_run(tmp_path, "http://127.0.0.1:9")
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl: is no file"):
        call(command.main, tmp_path)
    (tmp_path / "metrics.jsonl").rmdir()
    make_run(tmp_path, "sqlite:///mlflow.db")
    with pytest.raises(ConfigError, match="tracking section"):
        call(command.main, tmp_path)
