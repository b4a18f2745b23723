"""A run's folder: claimed once, its attempts counted, and how it ended."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.paths import ROOT
from warm_dist.config.run import load_config
from warm_dist.errors import DataError, OutputError, Stopped
from warm_dist.runs import folder
from warm_dist.runs.folder import Claim, describe_run, read_config, read_end, read_results, write_end, write_results

QUICKSTART = load_config(ROOT / "configs" / "quickstart.json")


def test_attempts_are_counted_and_the_folder_is_claimed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "git_commit", lambda: "c0ffee")
    claim = Claim.take(tmp_path / "run")
    assert claim.attempt == 1
    with pytest.raises(OutputError, match="another training process"):
        Claim.take(tmp_path / "run")
    describe_run(tmp_path / "run", QUICKSTART, claim.attempt, {"fingerprint": "x"})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["commit"] == "c0ffee"
    del claim
    assert Claim.take(tmp_path / "run").attempt == 2


def test_the_first_reason_stays(tmp_path):
    write_end(tmp_path, 1, 64, DataError("image x"))
    write_end(tmp_path, 1, 64, RuntimeError("lost a peer"))
    told = json.loads((tmp_path / "exit.json").read_text())
    assert told.pop("sha256")
    assert told == {"code": 3, "reason": "DataError: image x", "nimg": 64, "resumable": False, "attempt": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_an_earlier_attempt_s_end_is_not_this_one_s(tmp_path):
    assert read_end(tmp_path) is None
    write_end(tmp_path, 1, 64, DataError("image x"))
    written = (tmp_path / "exit.json").stat().st_mtime
    assert read_end(tmp_path, since=written).code == 3
    assert read_end(tmp_path, since=written + 60) is None


def test_a_new_claim_forgets_the_last_end(tmp_path):
    write_end(tmp_path, 1, 64, Stopped("SIGTERM"))
    claim = Claim.take(tmp_path)
    assert not (tmp_path / "exit.json").exists()
    claim.release()


def test_the_end_of_another_attempt_is_told_apart(tmp_path):
    write_end(tmp_path, 2, 64, DataError("image x"))
    assert read_end(tmp_path, attempt=2).nimg == 64
    assert read_end(tmp_path, attempt=3) is None


@pytest.mark.parametrize("how", ["removed", "another run", "another lock"])
def test_a_folder_that_was_replaced_is_not_written(tmp_path, how):
    """Fault: a live run's folder is removed, a second run starts on it, and both end well with mixed results."""
    run = tmp_path / "run"
    mine, guest = Claim.take(run), Claim(run)
    mine.check()
    shutil.rmtree(run) if how != "another lock" else (run / ".lock").unlink()
    if how != "removed":
        Claim.take(run)
    for claim in (mine, guest):
        with pytest.raises(OutputError, match="was removed or replaced while this run trained in it"):
            claim.check()
        claim.end(1, 64, DataError("image x"))
        claim.release()
    assert not (run / "exit.json").exists()


def test_a_config_that_differs_from_the_run_s_is_passed_over(tmp_path, monkeypatch, capsys):
    """Fault: one flipped bit of config.json is mirrored and reported as the run's learning rate."""
    monkeypatch.setattr(folder, "git_commit", lambda: "c0ffee")
    describe_run(tmp_path, QUICKSTART, 1, {})
    path = tmp_path / "config.json"
    assert read_config(tmp_path)["train"]["lr"] == QUICKSTART.train.lr
    path.write_text(path.read_text().replace('"lr": 0.00', '"lr": 0.01'))
    assert read_config(tmp_path) is None
    assert capsys.readouterr().err == f"{path}: differs from what the run wrote; passed over\n"


def test_a_cell_that_differs_from_what_was_written_is_left_out(tmp_path, capsys):
    """Fault: a flipped bit of results.json is a network's distance in the report."""
    assert read_results(tmp_path) is None
    write_results(tmp_path, {"a": {"frechet": 70.5, "per_block": []}, "b": {"frechet": 1.0}})
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace("70.5", "10.5"))
    assert read_results(tmp_path) == {"b": {"frechet": 1.0}}
    assert "the cell a differs from what was written" in capsys.readouterr().err
    path.write_text('{"a": {"frechet": 2.0}, "b": 7}')
    assert read_results(tmp_path) == {"a": {"frechet": 2.0}}, "of an older version"
    path.write_text("[1]")
    assert read_results(tmp_path) is None


def test_who_never_joined_tells_its_end_unless_the_folder_is_another_s(tmp_path):
    """Fault: no exit.json, or that of an earlier attempt, after a stop while peers were waited for."""
    write_end(tmp_path, 1, 80, None)
    Claim.end_unclaimed(tmp_path, Stopped("SIGTERM"))
    end = read_end(tmp_path)
    assert end is not None
    assert (end.code, end.reason, end.resumable) == (75, "Stopped: SIGTERM", True)
    assert not list(tmp_path.glob(".exit.*"))
    other = Claim.take(tmp_path)
    Claim.end_unclaimed(tmp_path, Stopped("SIGTERM"))
    assert read_end(tmp_path) is None
    other.release()
