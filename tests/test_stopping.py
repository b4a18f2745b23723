"""Every way to stop a run, for real: what was sent to whom, the save, exit.json, nothing left behind, the same command goes on.

Each chain of cases is one run: every stop is answered by the same command, which the next case then stops.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from tests.processes import MARK, ROOT, end_marked, free_port, marked, run_ranks, wait_for
from tests.test_train import (
    BATCH,
    config_file,
    environment,
    finish,
    launcher,
    losses,
    outcome,
    ranks,
    reached,
    start,
    train,
)
from warm_dist import errors
from warm_dist.runs.metrics import parse_line

__all__ = ["config_file"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PREEMPTION_FILE = "preempted"
TIMEOUT_S = 5  # for those who wait for a hung rank
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
        "SIGINT to the deepspeed command": Case("deepspeed", signal.SIGINT, "runner", " on rank "),
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
        "SIGTERM to launch.py": Case("deepspeed", signal.SIGTERM, "launch.py", "SIGTERM on rank "),
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
        told_s = wait_for("exit.json", (run / "exit.json").exists)
        empty_s = told_s + wait_for("nobody left", lambda: not marked(mark))
        preemption.unlink(missing_ok=True)
    finally:
        end_marked(mark)
        _, _, err = finish(process)
    first = lines_of(run, attempt)[0]["nimg"]
    saved = sorted(path.parent.name for path in run.glob("checkpoints/*/COMPLETE"))
    return Stop(told_s, empty_s, outcome(run), first, saved, err)


class Chain(NamedTuple):
    """The stops of one run in order; the first chain's run goes on to its end, beside an unbroken one."""

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
        for run in () if number else (root / "run", root / "whole"):
            code, _, err = train(launcher("torchrun"), config_file, run, *ends)
            assert code == 0, err
        return Chain(stops, root / "run", root / "whole")

    with ThreadPoolExecutor(len(CHAINS)) as pool:
        return list(pool.map(go, range(len(CHAINS))))


@pytest.mark.parametrize(("number", "name"), [(number, name) for number, chain in enumerate(CHAINS) for name in chain])
def test_a_stop_saves_and_ends_everything(chains, number, name):
    found = chains[number].stops[name]
    told = found.outcome
    print(f"{name}: saved after {found.told_s:.1f} s, nothing left after {found.empty_s:.1f} s: {told['reason']}")
    assert (told["code"], told["resumable"]) == (errors.Stopped.exit_code, True), told
    assert CHAINS[number][name].words in told["reason"]
    assert found.told_s < 30  # what launchers grant before they kill
    assert found.empty_s < 40
    assert any(str(told["nimg"]) in checkpoint for checkpoint in found.checkpoints)
    assert 'launch/train.py", line' not in found.stderr  # launchers' own tracebacks are theirs


@pytest.mark.parametrize("number", range(len(CHAINS)))
def test_the_same_command_goes_on_after_each_stop(chains, number):
    """Every attempt begins one step after the last one's save."""
    stops = list(chains[number].stops.values())
    assert [stop.outcome["attempt"] for stop in stops] == list(range(1, len(stops) + 1))
    assert [stop.first_nimg for stop in stops[1:]] == [stop.outcome["nimg"] + BATCH for stop in stops[:-1]]


def test_a_run_stopped_again_and_again_equals_an_unbroken_one_bit_by_bit(chains):
    assert losses(chains[0].run) == losses(chains[0].whole)


@pytest.fixture(scope="module")
def hung(
    config_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[float, dict[str, Any], list[str]]]:
    """Two runs of two ranks, of which one is stopped (not ended): seconds until the other told, exit.json, both stderr."""
    runs = {rank: tmp_path_factory.mktemp(f"hung{rank}") / "run" for rank in range(2)}
    settings = [*ENDLESS[1:], "parallel.zero_stage=2", f"parallel.timeout_s={TIMEOUT_S}"]  # DeepSpeed's groups too
    pairs = {rank: ranks(config_file, run, *settings) for rank, run in runs.items()}
    found = {}
    for rank, run in runs.items():
        wait_for("some steps", lambda run=run: len(lines_of(run, 1)) >= 3)
        os.kill(pairs[rank][rank].pid, signal.SIGSTOP)
        told_s = wait_for("the other rank's word", (run / "exit.json").exists)
        os.kill(pairs[rank][rank].pid, signal.SIGCONT)  # it finds itself alone
        ends = [finish(process) for process in pairs[rank]]
        assert [code for code, _, _ in ends] == [errors.UnreachableError.exit_code] * 2, ends
        found[rank] = (told_s, outcome(run), [err for _, _, err in ends])
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_rank_is_named_in_time_by_the_other(hung, rank):
    """Rank 0 holds the store, so its silence shows otherwise; and then rank 1 must speak."""
    told_s, told, said = hung[rank]
    print(f"told after {told_s:.1f} s: {told['reason']}")
    assert told["reason"].startswith(f"UnreachableError: rank {rank} (host ")
    assert f"; rank {1 - rank} (host " in told["reason"]
    assert "of nimg " in told["reason"]
    assert told["resumable"]
    assert told_s < TIMEOUT_S + 5  # a step that had begun, and the slowness of a busy machine
    assert said[1 - rank].count("UnreachableError: ") == 1


def test_groups_that_others_make_have_our_patience():
    """DeepSpeed makes its own without a timeout; a rank hung in its backward was once not noticed for 30 minutes."""
    code = (
        "import torch, torch.distributed as dist; from warm_dist import distributed; distributed.init(7); "
        "print(dist.new_group([0, 1])._get_backend(torch.device('cpu')).options._timeout)"
    )
    ends = run_ranks(["-c", code], 2)
    assert [end.stdout.strip() for end in ends] == ["0:00:07"] * 2, ends


def test_a_rank_that_never_comes_is_named():
    code = "from warm_dist import distributed, errors; errors.run(lambda: distributed.init(1, join_s=3) and None)"
    shared = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    alone = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=shared | {"RANK": rank, "MASTER_PORT": str(free_port())},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=120)[1].splitlines()[-1] for process in alone]
    print(*said, sep="\n")
    assert [process.returncode for process in alone] == [errors.UnreachableError.exit_code] * 2
    assert "in 3 s: rank 1 did not come, only 0 (host " in said[0]
    assert "in 3 s: rank 0's machine does not answer" in said[1]
