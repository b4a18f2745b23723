"""Following a run's folder: when it has ended and how, one mirror at a time, and the last tries."""

from __future__ import annotations

import fcntl
import os
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.mirrored_run import STEPS, end, log, make_run
from warm_dist import supervisor
from warm_dist.errors import ConfigError, OutputError, UnreachableError
from warm_dist.tracking import follow
from warm_dist.tracking.client import reaching
from warm_dist.tracking.mirror import Mirror


def test_an_old_run_s_credentials_are_not_used(run: Path) -> None:
    """Fault: a run of before, whose config holds a password, cannot be mirrored; or it is taken from there."""
    assert follow._tracking(run).mlflow_url == "http://127.0.0.1:1/"


def test_mlflow_s_url_takes_no_credentials() -> None:
    with pytest.raises(ConfigError, match=r"http://h: holds .* MLFLOW_TRACKING_USERNAME"), reaching("http://u:p@h"):
        pass


def test_how_a_run_has_ended(run: Path) -> None:
    """Fault: the exit.json of the attempt before ends the new one, or a killed run stays RUNNING in MLflow."""
    me, nobody = supervisor.identity(os.getpid()), "999999999:1"
    assert follow._end(run, 1, me) is None
    assert not follow._ended(run, me)
    assert follow._ended(run, nobody)
    assert (follow._end(run, 1, nobody) or [None])[0] == "KILLED"
    assert follow._end(run, 0, nobody) is None, "a later attempt is under way"
    for code, status in ((0, "FINISHED"), (75, "KILLED"), (1, "FAILED"), (11, "FAILED")):
        end(run, code)
        found_end = follow._end(run, 1, None)
        assert found_end is not None
        assert found_end[:2] == (status, {"exit.code": str(code), "exit.reason": f"code {code}"})
    make_run(run, "", attempt=2)
    assert follow._end(run, 2, me) is None, "the exit of the attempt before says nothing"
    assert not follow._ended(run, me)


def test_two_mirrors_exclude_each_other(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LOCK_S", 0.0)
    for _ in range(2):  # the second time shows that the lock was given back
        with follow._only_mirror(run), pytest.raises(OutputError, match="another mirror"), follow._only_mirror(run):
            pass


def test_the_next_attempts_mirror_waits_for_the_one_before(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LOCK_S", 0.0)
    monkeypatch.setattr(follow, "POLL_S", 0.1)
    got: list[str] = []

    def wait() -> None:
        with follow._only_mirror(run, supervisor.identity(os.getpid())):
            got.append("lock")

    with follow._only_mirror(run):
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        assert not got
    waiting.join(20)
    assert got == ["lock"]


def test_last_tries_end_when_the_run_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(run, STEPS)
    tries: list[int] = []
    monkeypatch.setattr(follow, "LAST_TRIES", 50)

    class Away(Mirror):
        def sync(self, running: bool) -> int:
            tries.append(1)
            make_run(self.run, None, attempt=2)
            raise UnreachableError("away")

    with pytest.raises(UnreachableError, match="away"):
        follow._finish(Away(run, "http://127.0.0.1:9", "x"), 1, None)
    assert len(tries) == 1


def test_a_server_that_is_down_is_asked_ever_less_often_but_twice_a_minute(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: pauses that grow without a bound, so that a server is back for hours before the mirror notices."""
    slept: list[float] = []
    tries: list[float] = []
    made_up = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append, strftime=lambda form: "then")
    monkeypatch.setattr(follow, "time", made_up)

    class Away(Mirror):
        def sync(self, running: bool) -> int:
            tries.append(sum(slept))
            if len(tries) == 7:
                end(self.run, 0)
            raise UnreachableError("away")

    follow._follow(Away(run, "http://127.0.0.1:9", "x"), None)
    assert [after - before for before, after in pairwise(tries)] == [2, 4, 8, 16, 30, 30]


def test_a_run_that_was_cut_off_is_killed_once_nobody_is_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert follow._end(run, 1, None) is None, "nothing says that it ever began"
    (run / "heartbeat").mkdir()
    (run / "heartbeat" / "rank_0.json").write_text("{}")
    lock = (run / ".lock").open("a+")
    fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setattr(follow, "SILENCE_S", -1.0)
    assert follow._end(run, 1, None) is None, "somebody holds the lock"
    lock.close()
    assert (follow._end(run, 1, None) or [None])[0] == "KILLED"
    monkeypatch.setattr(follow, "SILENCE_S", 60.0)
    assert follow._end(run, 1, None) is None, "its heart beats, on a machine whose locks we do not see"


def test_a_full_disk_does_not_hide_the_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from warm_dist.tracking import curve

    def full(*_: Any) -> None:
        raise OutputError("disk full")

    log(run, STEPS[:3])
    monkeypatch.setattr(curve, "loss_curve", full)
    assert follow._curves(run) == []
    monkeypatch.undo()
    assert follow._curves(run) == [run / "curves.png"]
