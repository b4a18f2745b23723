"""A trial without Ray: its command, its config, and the process that is followed by its metrics.jsonl."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.processes import wait_for
from tests.support.sweeps import EVERY, TOTAL, pack_digits, write_sweep
from tests.support.trials import ONE, first
from warm_dist import errors
from warm_dist.checkpoints.format import CHECKPOINTS, complete_names, nimg_of
from warm_dist.files import read_json
from warm_dist.store.open import open_store
from warm_dist.sweeps.trial_process import TrialRun, make_paths


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pack_digits(tmp_path_factory.mktemp("data"))


def follow(run: TrialRun, timeout_s: float = 120) -> list[int]:
    """Report all evaluations until the end, or until time is up."""
    reported = []

    def done() -> bool:
        end = run.end()
        for record in run.evaluations(end is not None and end.code == 0):
            assert record["nimg"] < TOTAL or (run.run / "weights" / "ema.safetensors").exists(), (
                "the last comes with them"
            )
            run.report(record["nimg"])
            reported.append(record["nimg"])
        return end is not None

    wait_for("the trial's end", done, timeout_s)
    return reported


def test_the_life_of_a_trial(tmp_path, manifest):
    """Killed at its first evaluation; started again; ended by its owner; finished. Each evaluation is told a driver once.

    Fault: an evaluation reported twice to one driver, or withheld from the next.
    """
    sweep, trial = first(write_sweep(tmp_path, manifest, {"process.bnr": {"grid": [0.5]}}))
    place = make_paths(sweep, "f00d", None)
    make = lambda session: TrialRun(trial, place, ONE, session)  # noqa: E731
    run = make("one")
    run.start()
    wait_for("an evaluation", lambda: next(run.evaluations(False), None) is not None)
    (train,) = children_of(run)
    os.kill(train, signal.SIGKILL)
    wait_for("the end", lambda: run.end() is not None)
    end = run.end()
    assert (end.code, end.final) == (137, False)
    assert "no exit.json" in end.reason
    told = [record["nimg"] for record in run.evaluations(False)]
    for nimg in told:
        run.report(nimg)
    assert told[0] == EVERY
    run.close()
    assert read_json(run.run / "exit.json")["reason"].startswith("Stopped: ended by the sweep")

    again = make("one")  # the same driver: what it knows is not told again
    again.start()
    rest = follow(again)
    assert told + rest == list(range(EVERY, TOTAL + 1, EVERY))
    assert (again.end().code, read_json(again.run / "run.json")["attempt"]) == (0, 2)
    again.close()

    third = make("two")  # another driver, which knows nothing
    third.start()
    assert follow(third) == list(range(EVERY, TOTAL + 1, EVERY))
    third.close()


def test_an_early_end_saves(tmp_path, manifest):
    """Fault: the training is killed before it can save, and only an exit.json is written in its name."""
    sweep, trial = first(write_sweep(tmp_path, manifest, {}, {"train.total_nimg": 1_600_000, "train.log_nimg": 160}))
    run = TrialRun(trial, make_paths(sweep, "f00d", None), ONE, "one")
    run.start()
    wait_for("an evaluation", lambda: next(run.evaluations(False), None) is not None)
    run.close()
    end = read_json(run.run / "exit.json")
    assert (end["code"], end["resumable"]) == (errors.Stopped.exit_code, True)
    assert "before it could save" not in end["reason"]
    assert nimg_of(complete_names(open_store(str(run.run)), CHECKPOINTS)[-1]) == end["nimg"] > 0
    assert not children_of(run)


def test_a_config_that_cannot_run_is_final(tmp_path, manifest):
    sweep, trial = first(write_sweep(tmp_path, str(tmp_path / "nowhere" / "manifest.parquet"), {}))
    run = TrialRun(trial, make_paths(sweep, "f00d", None), ONE, "one")
    run.start()
    assert follow(run) == []
    end = run.end()
    assert (end.code, end.final) == (errors.DataError.exit_code, True)
    assert "nowhere/manifest.parquet" in end.reason
    run.close()


def children_of(run: TrialRun) -> list[int]:
    """The training's pids: the supervisor's children that run launch.train."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if "launch.train" in words and str(run.run / "trial.json") in words and "warm_dist.supervisor" not in words:
                found.append(int(entry.name))
    return found
