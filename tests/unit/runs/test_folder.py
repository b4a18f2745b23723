"""A run's folder: claimed once, its attempts counted, and how it ended."""

from __future__ import annotations

import json

import pytest

from tests.support.paths import ROOT
from warm_dist.config.run import load_config
from warm_dist.errors import DataError, OutputError, Stopped
from warm_dist.runs import folder
from warm_dist.runs.folder import claim_run, describe_run, read_end, write_end

QUICKSTART = load_config(ROOT / "configs" / "quickstart.json")


def test_attempts_are_counted_and_the_folder_is_claimed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "git_commit", lambda: "c0ffee")
    attempt, lock = claim_run(tmp_path / "run")
    assert attempt == 1
    with pytest.raises(OutputError, match="another training process"):
        claim_run(tmp_path / "run")
    describe_run(tmp_path / "run", QUICKSTART, attempt, {"fingerprint": "x"})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["commit"] == "c0ffee"
    lock.close()
    assert claim_run(tmp_path / "run")[0] == 2


def test_the_first_reason_stays(tmp_path):
    write_end(tmp_path, 1, 64, DataError("image x"))
    write_end(tmp_path, 1, 64, RuntimeError("lost a peer"))
    told = json.loads((tmp_path / "exit.json").read_text())
    assert told == {"code": 3, "reason": "DataError: image x", "nimg": 64, "resumable": False, "attempt": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_an_earlier_attempt_s_end_is_not_this_one_s(tmp_path):
    assert read_end(tmp_path) is None
    write_end(tmp_path, 1, 64, DataError("image x"))
    written = (tmp_path / "exit.json").stat().st_mtime
    assert read_end(tmp_path, since=written)["code"] == 3
    assert read_end(tmp_path, since=written + 60) is None


def test_a_new_claim_forgets_the_last_end(tmp_path):
    write_end(tmp_path, 1, 64, Stopped("SIGTERM"))
    _, lock = claim_run(tmp_path)
    assert not (tmp_path / "exit.json").exists()
    lock.close()


def test_the_end_of_another_attempt_is_told_apart(tmp_path):
    write_end(tmp_path, 2, 64, DataError("image x"))
    assert read_end(tmp_path, attempt=2)["nimg"] == 64
    assert read_end(tmp_path, attempt=3) is None
