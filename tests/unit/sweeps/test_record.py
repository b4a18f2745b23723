"""What a sweep's output knows of it, and what it says to an output that is no sweep's, or another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.spaces import BASE, sweep
from warm_dist.errors import ConfigError, DataError
from warm_dist.store.open import open_store
from warm_dist.sweeps.record import Ended, SweepRecord
from warm_dist.sweeps.trials import trials


def make(grid, **more):
    return trials(sweep({"train.lr": {"grid": grid}}, **more), BASE)


@pytest.fixture
def ledger(tmp_path: Path) -> SweepRecord:
    return SweepRecord(open_store(str(tmp_path / "out"), None))


def begun(ledger: SweepRecord, found) -> dict:
    record = ledger.claim(found, resume=False)
    ledger.keep(record, found)
    ledger.write(f"trials/{found[0].name}/trial.json", {})
    return record


def test_a_sweep_that_has_begun_is_gone_on_with_only_on_request(ledger):
    record = begun(ledger, make([0.1, 0.2]))
    with pytest.raises(ConfigError, match="holds a sweep already; --resume goes on with it"):
        ledger.claim(make([0.1, 0.2]), resume=False)
    assert ledger.claim(make([0.1, 0.2]), resume=True).id == record.id


def test_values_and_seeds_may_be_added_and_none_taken_away(ledger):
    record = begun(ledger, make([0.1, 0.2]))
    assert ledger.claim(make([0.3, 0.1, 0.2], seeds=[1, 0]), resume=True).id == record.id
    for other in (make([0.1]), make([0.1, 0.2], seeds=[1]), make([0.1, 0.25])):
        with pytest.raises(ConfigError, match="holds a sweep of other trials"):
            ledger.claim(other, resume=True)


def test_a_start_that_came_to_nothing_claims_nothing(ledger):
    found = make([0.1])
    record = ledger.claim(found, resume=False)
    ledger.keep(record, found)
    assert ledger.claim(make([0.2]), resume=False).id == record.id


def test_how_a_trial_ended_is_kept_and_may_be_forgotten(ledger):
    (trial,) = make([0.1])
    assert ledger.ended(trial.name) is None
    ledger.end(trial.name, Ended(state="failed", reason="no luck", nimg=32))
    assert ledger.ended(trial.name) == Ended(state="failed", reason="no luck", nimg=32)
    ledger.forget(trial.name)
    assert ledger.ended(trial.name) is None


def test_evaluations_are_those_of_metrics_jsonl(ledger, tmp_path):
    assert ledger.evaluations("a") == []
    lines = [
        {"time": 1, "attempt": 1, "nimg": 32, "kind": "eval", "frechet": 3.0},
        {"time": 2, "attempt": 2, "nimg": 32, "kind": "eval", "frechet": 2.0},
        {"time": 2, "attempt": 2, "nimg": 16, "kind": "train", "loss": 1.0},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"half'
    ledger.store.write("trials/a/metrics.jsonl", text.encode())
    assert ledger.evaluations("a") == [lines[1]]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"id": "a"}', "null"])
def test_a_damaged_record_is_told_of(ledger, text):
    ledger.store.write("sweep.json", text.encode())
    ledger.write("trials/a/trial.json", {})
    with pytest.raises(DataError, match=r"sweep\.json"):
        ledger.claim(make([0.1]), resume=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": "finished"}'])
def test_a_damaged_end_is_told_of(ledger, text):
    ledger.store.write("trials/a/ended.json", text.encode())
    with pytest.raises(DataError, match=r"trials/a/ended\.json"):
        ledger.ended("a")


def test_trials_without_a_record_are_nobody_s(ledger):
    ledger.write("trials/a/trial.json", {})
    with pytest.raises(DataError, match=r"has trials but no sweep\.json"):
        ledger.claim(make([0.1]), resume=True)


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_an_ended_trial_has_the_evaluation_that_ranks_it(ledger, tmp_path, state):
    """Fault: metrics.jsonl of the best trial is lost, and another one is silently the best."""
    (trial,) = make([0.1])
    total = trial.config.train.total_nimg
    path = tmp_path / "out" / "trials" / trial.name / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    ended = Ended(state=state, reason="", nimg=total)

    def evaluated(nimg):
        path.write_text(json.dumps({"time": 1.0, "attempt": 1, "nimg": nimg, "kind": "eval", "frechet": 2.0}) + "\n")

    evaluated(total)
    ledger.check(trial, ended)
    for nimg in (None, 64):
        path.write_text("") if nimg is None else evaluated(nimg)
        if state == "failed" or (state == "stopped" and nimg):
            ledger.check(trial, ended)
            continue
        with pytest.raises(DataError, match=r"metrics\.jsonl: has no evaluation at the trial's end, nimg \d+; bring"):
            ledger.check(trial, ended)
