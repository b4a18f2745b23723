"""Every way to stop a run, for real: what was sent to whom, the save, exit.json, nothing left behind, the same command goes on.

Each chain of cases is one run: every stop is answered by the same command, which the next case then stops. The first
chain has every launcher, every signal and what is sent to a rank itself; launch/node.py's test sends SIGTERM to torchrun.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from tests.support.processes import MARK, end_marked, free_port, marked, wait_for
from tests.support.ranks import run_ranks
from tests.support.training import (
    BATCH,
    ENDLESS,
    environment,
    finish,
    fork_ranks,
    launcher,
    losses,
    outcome,
    reached,
    start,
)
from tests.support.zygote import zygote
from warm_dist import errors
from warm_dist.runs.metrics import parse_line

pytestmark = pytest.mark.timeout(600)
PREEMPTION_FILE = "preempted"
TIMEOUT_S = 5  # for those who wait for a hung rank
SETTINGS = ["engine=local", "train.save_nimg=8000000"]  # every save is a stop's


class Case(NamedTuple):
    """How to start ("forks": no launcher), what to send, to whom ("group", "file", or a role of tests.support.processes), what the reason says."""

    launcher: str
    signal: signal.Signals
    to: str
    words: str


CHAINS = [
    {
        "SIGTERM to one rank": Case("forks", signal.SIGTERM, "rank 1", "SIGTERM on rank 1 (host "),
        "SIGTERM to the deepspeed command": Case(
            "deepspeed", signal.SIGTERM, "runner", "the end of the deepspeed command"
        ),
        "SIGINT to one rank": Case("forks", signal.SIGINT, "rank 1", "SIGINT on rank 1 (host "),
        "kill -9 of launch.py": Case("deepspeed", signal.SIGKILL, "launch.py", "SIGTERM on rank "),
        "preemption file": Case("forks", signal.SIGTERM, "file", PREEMPTION_FILE),
        "SIGINT to torchrun": Case("torchrun", signal.SIGINT, "torchrun", "SIG"),
        "SIGINT to the process group": Case("deepspeed", signal.SIGINT, "group", "SIGINT on rank "),
    },
    {
        "SIGTERM to torchrun": Case("torchrun", signal.SIGTERM, "torchrun", "SIGTERM on rank "),
        "SIGINT to the deepspeed command": Case("deepspeed", signal.SIGINT, "runner", " on rank "),
        "kill -9 of the deepspeed command": Case(
            "deepspeed", signal.SIGKILL, "runner", "the end of the deepspeed command"
        ),
        "SIGTERM to launch.py": Case("deepspeed", signal.SIGTERM, "launch.py", "SIGTERM on rank "),
        "SIGTERM to one rank under torchrun": Case("torchrun", signal.SIGTERM, "rank 1", "SIGTERM on rank 1 (host "),
        "preemption file under deepspeed": Case("deepspeed", signal.SIGTERM, "file", PREEMPTION_FILE),
    },
]
EVERYDAY_AND_SOAK = [0, pytest.param(1, marks=pytest.mark.soak)]


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
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = [record for record in map(parse_line, lines) if record is not None]
    return [record for record in records if record["attempt"] == attempt and record["kind"] == "train"]


class Attempt:
    """The processes of one attempt, by a launcher or as forked ranks."""

    def __init__(self, how: str, config: Path, run: Path, *overrides: str) -> None:
        self.mark = uuid4().hex
        self.forks = fork_ranks(config, run, *overrides) if how == "forks" else []
        self.processes = self.forks or [start(launcher(how), config, run, *overrides, env={MARK: self.mark})]

    def pid(self, role: str) -> int:
        if self.forks:
            return self.forks[int(role.removeprefix("rank "))].pid
        (pid,) = [found.pid for found in marked(self.mark) if found.role == role]
        return pid

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def left(self) -> bool:
        return bool(marked(self.mark)) or any(fork.poll() is None for fork in self.forks)

    def end(self) -> str:
        """Whatever is left is killed; what they said on stderr."""
        end_marked(self.mark)
        for fork in self.forks:
            fork.kill()
        return "".join(finish(process)[2] for process in self.processes)


def stop(case: Case, number: int, config: Path, run: Path) -> Stop:
    preemption = run / PREEMPTION_FILE
    attempt = Attempt(case.launcher, config, run, *SETTINGS, ENDLESS, f"parallel.preemption_file={preemption}")
    try:
        wait_for("some steps", lambda: len(lines_of(run, number)) >= 3 or not attempt.running())
        if case.to == "file":
            preemption.touch()
        elif case.to == "group":
            os.killpg(attempt.processes[0].pid, case.signal)
        else:
            os.kill(attempt.pid(case.to), case.signal)
        told_s = wait_for("exit.json", (run / "exit.json").exists)
        empty_s = told_s + wait_for("nobody left", lambda: not attempt.left())
        preemption.unlink(missing_ok=True)
    finally:
        err = attempt.end()
    first = lines_of(run, number)[0]["nimg"]
    saved = sorted(path.parent.name for path in run.glob("checkpoints/*/COMPLETE"))
    return Stop(told_s, empty_s, outcome(run), first, saved, err)


class Chain(NamedTuple):
    """The stops of one run in order, after which it went on to its end; and an unbroken run."""

    stops: dict[str, Stop]
    run: Path
    whole: Path


@pytest.fixture(scope="module")
def chain(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Chain]:
    """A chain by its number in CHAINS; done when first asked for."""

    @cache
    def go(number: int) -> Chain:
        root = tmp_path_factory.mktemp(f"chain{number}")
        run, whole = root / "run", root / "whole"
        cases = enumerate(CHAINS[number].items(), 1)
        stops = {name: stop(case, attempt, config_file, run) for attempt, (name, case) in cases}
        total = f"train.total_nimg={reached(run) + 4 * BATCH}"
        for folder in (run, whole):
            ends = [finish(rank) for rank in fork_ranks(config_file, folder, *SETTINGS, total)]
            assert [code for code, _, _ in ends] == [0, 0], ends
        return Chain(stops, run, whole)

    return go


@pytest.mark.parametrize(
    ("number", "name"),
    [
        pytest.param(number, name, marks=[pytest.mark.soak] if number else [])
        for number, cases in enumerate(CHAINS)
        for name in cases
    ],
)
def test_a_stop_saves_and_ends_everything(chain, number, name):
    found = chain(number).stops[name]
    told = found.outcome
    print(f"{name}: saved after {found.told_s:.1f} s, nothing left after {found.empty_s:.1f} s: {told['reason']}")
    assert (told["code"], told["resumable"]) == (errors.Stopped.exit_code, True), told
    assert CHAINS[number][name].words in told["reason"]
    assert found.told_s < 30  # what launchers grant before they kill
    assert found.empty_s < 40
    assert any(str(told["nimg"]) in checkpoint for checkpoint in found.checkpoints)
    assert 'launch/train.py", line' not in found.stderr  # launchers' own tracebacks are theirs


@pytest.mark.parametrize("number", EVERYDAY_AND_SOAK)
def test_the_same_command_goes_on_after_each_stop(chain, number):
    """Every attempt begins one step after the last one's save."""
    stops = list(chain(number).stops.values())
    assert [stop.outcome["attempt"] for stop in stops] == list(range(1, len(stops) + 1))
    assert [stop.first_nimg for stop in stops[1:]] == [stop.outcome["nimg"] + BATCH for stop in stops[:-1]]


@pytest.mark.parametrize("number", EVERYDAY_AND_SOAK)
def test_a_run_stopped_again_and_again_equals_an_unbroken_one_bit_by_bit(chain, number):
    assert losses(chain(number).run) == losses(chain(number).whole)


@pytest.fixture(scope="module")
def hung(
    config_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[float, dict[str, Any], list[str]]]:
    """Two runs of two ranks, of which one is stopped (not ended): seconds until the other told, exit.json, both stderr."""
    runs = {rank: tmp_path_factory.mktemp(f"hung{rank}") / "run" for rank in range(2)}
    settings = [
        ENDLESS,
        SETTINGS[1],
        "parallel.zero_stage=2",
        f"parallel.timeout_s={TIMEOUT_S}",
    ]  # DeepSpeed's groups too
    pairs = {rank: fork_ranks(config_file, run, *settings) for rank, run in runs.items()}
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
    assert told_s < 12 * TIMEOUT_S  # soon on an idle machine; a wait without a timeout of ours is half an hour
    assert said[1 - rank].count("UnreachableError: ") == 1


def test_groups_that_others_make_have_our_patience():
    """DeepSpeed makes its own without a timeout; a rank hung in its backward was once not noticed for 30 minutes."""
    code = (
        "import torch, torch.distributed as dist; from warm_dist.distributed.world import join; join(7); "
        "print(dist.new_group([0, 1])._get_backend(torch.device('cpu')).options._timeout)"
    )
    ends = run_ranks("-c", code, size=2)
    assert [end.stdout.strip() for end in ends] == ["0:00:07"] * 2, ends


def test_a_rank_that_never_comes_is_named():
    code = "from warm_dist import errors; from warm_dist.distributed.world import join; errors.run(lambda: join(1, join_s=3) and None)"
    shared = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    alone = [zygote().start("-c", code, env=shared | {"RANK": rank, "MASTER_PORT": str(free_port())}) for rank in "01"]
    said = [process.communicate(120)[1].splitlines()[-1] for process in alone]
    print(*said, sep="\n")
    assert [process.returncode for process in alone] == [errors.UnreachableError.exit_code] * 2
    assert "in 3 s: rank 1 did not come, only 0 (host " in said[0]
    assert "in 3 s: rank 0's machine does not answer" in said[1]
