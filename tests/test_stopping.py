"""Every way to stop a run, for real: what was sent to whom, the save, exit.json, nothing left behind, the same command goes on.

Each chain of cases is one run: every stop is answered by the same command, which the next case then stops.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from tests.processes import MARK, end_marked, marked
from tests.test_train import BATCH, config_file, finish, launcher, losses, outcome, reached, start, train, wait_for
from warm_dist import errors
from warm_dist.metrics import parse_line

__all__ = ["config_file"]  # a fixture
pytestmark = pytest.mark.slow
PREEMPTION_FILE = "preempted"
ENDLESS = ["engine=local", "train.total_nimg=8000000", "train.save_nimg=8000000"]  # every save is a stop's


class Case(NamedTuple):
    """How to start, what to send, to whom ("group", "file", or a role of tests.processes), what the reason says."""

    launcher: str
    signal: signal.Signals
    to: str
    words: str


CHAINS = [
    {
        "SIGTERM to one rank": Case("deepspeed", signal.SIGTERM, "rank 1", "SIGTERM on rank 1 (host "),
        "SIGTERM to the deepspeed command": Case(
            "deepspeed", signal.SIGTERM, "runner", "the end of the deepspeed command"
        ),
        "SIGTERM to launch.py": Case("deepspeed", signal.SIGTERM, "launch.py", "SIGTERM on rank "),
        "kill -9 of launch.py": Case("deepspeed", signal.SIGKILL, "launch.py", "SIGTERM on rank "),
        "SIGINT to the process group": Case("deepspeed", signal.SIGINT, "group", "SIGINT on rank "),
    },
    {
        "SIGTERM to torchrun": Case("torchrun", signal.SIGTERM, "torchrun", "SIGTERM on rank "),
        "SIGINT to one rank": Case("torchrun", signal.SIGINT, "rank 1", "SIGINT on rank 1 (host "),
        "SIGINT to torchrun": Case("torchrun", signal.SIGINT, "torchrun", "SIG"),
        "kill -9 of the deepspeed command": Case(
            "deepspeed", signal.SIGKILL, "runner", "the end of the deepspeed command"
        ),
        "preemption file": Case("torchrun", signal.SIGTERM, "file", PREEMPTION_FILE),
    },
]


class Stop(NamedTuple):
    """What came of a case: seconds to exit.json and until nothing was left, the outcome, the metrics' first nimg."""

    told_s: float
    empty_s: float
    outcome: dict[str, Any]
    first_nimg: int
    checkpoints: list[str]
    stderr: str


def lines_of(run: Path, attempt: int) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [record for record in map(parse_line, lines) if record is not None]
    return [record for record in records if record["attempt"] == attempt and record["kind"] == "train"]


def seconds_until(condition: Callable[[], bool], what: str) -> float:
    began = time.monotonic()
    wait_for(what, condition)
    return time.monotonic() - began


def stop(case: Case, attempt: int, config: Path, run: Path) -> Stop:
    mark, preemption = uuid4().hex, run / PREEMPTION_FILE
    settings = [*ENDLESS, f"parallel.preemption_file={preemption}"]
    process = start(launcher(case.launcher), config, run, *settings, env={MARK: mark})
    try:
        wait_for("some steps", lambda: len(lines_of(run, attempt)) >= 3 or process.poll() is not None)
        if case.to == "file":
            preemption.touch()
        elif case.to == "group":
            os.killpg(process.pid, case.signal)
        else:
            (target,) = [found.pid for found in marked(mark) if found.role == case.to]
            os.kill(target, case.signal)
        told_s = seconds_until((run / "exit.json").exists, "exit.json")
        empty_s = told_s + seconds_until(lambda: not marked(mark), f"nobody left: {marked(mark)}")
        preemption.unlink(missing_ok=True)
    finally:
        end_marked(mark)
        _, _, err = finish(process)
    first = lines_of(run, attempt)[0]["nimg"]
    saved = sorted(path.parent.name for path in run.glob("checkpoints/*/COMPLETE"))
    return Stop(told_s, empty_s, outcome(run), first, saved, err)


class Chain(NamedTuple):
    """The stops of one run in order, and that run and an unbroken one, both finished."""

    stops: dict[str, Stop]
    run: Path
    whole: Path


@pytest.fixture(scope="module")
def chains(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Chain]:
    def go(number: int) -> Chain:
        root = tmp_path_factory.mktemp(f"chain{number}")
        stops = {
            name: stop(case, attempt, config_file, root / "run")
            for attempt, (name, case) in enumerate(CHAINS[number].items(), 1)
        }
        ends = [*ENDLESS, f"train.total_nimg={reached(root / 'run') + 4 * BATCH}", f"train.save_nimg={BATCH * 1000}"]
        for run in (root / "run", root / "whole"):
            code, _, err = train(launcher("torchrun"), config_file, run, *ends)
            assert code == 0, err
        return Chain(stops, root / "run", root / "whole")

    with ThreadPoolExecutor(len(CHAINS)) as pool:
        return list(pool.map(go, range(len(CHAINS))))


@pytest.mark.parametrize(("number", "name"), [(number, name) for number, chain in enumerate(CHAINS) for name in chain])
def test_a_stop_saves_and_ends_everything(chains, number, name):
    found = chains[number].stops[name]
    told = found.outcome
    assert (told["code"], told["resumable"]) == (errors.Stopped.exit_code, True), told
    assert CHAINS[number][name].words in told["reason"]
    assert found.told_s < 30  # what launchers grant before they kill
    assert found.empty_s < 40
    assert any(str(told["nimg"]) in checkpoint for checkpoint in found.checkpoints)
    assert "Traceback" not in found.stderr or "SignalException" in found.stderr or "KeyboardInterrupt" in found.stderr


@pytest.mark.parametrize("number", range(len(CHAINS)))
def test_the_same_command_goes_on_after_each_stop(chains, number):
    """Every attempt begins one step after the last one's save, and the whole equals an unbroken run bit by bit."""
    stops = list(chains[number].stops.values())
    assert [stop.outcome["attempt"] for stop in stops] == list(range(1, len(stops) + 1))
    assert [stop.first_nimg for stop in stops[1:]] == [stop.outcome["nimg"] + BATCH for stop in stops[:-1]]
    assert losses(chains[number].run) == losses(chains[number].whole)
