"""Several nodes for real: one run that loses a node, a link and a rank in turn, and goes on each time, at other sizes too.

Each failure is one attempt of the same run, by another launcher and engine. DeepSpeed's runner reaches the nodes by pdsh where that is installed, else by
a stand-in for it; ssh is a stand-in always (tests/multinode/nodes.py). Rank 0's node holds the rendezvous store.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.multinode.nodes import MASTER, PORT, Cluster, need
from tests.support.processes import MARK, ROOT, end_marked, marked, wait_for
from tests.support.training import environment, finish, fork, losses, outcome
from warm_dist import errors
from warm_dist.runs.metrics import parse_line

pytestmark = pytest.mark.timeout(600)
BATCH, TIMEOUT_S, BIN = 48, 10, Path(sys.executable).parent
STEPS = 8  # before each failure
NOTICED_S = TIMEOUT_S + 5  # a step that had begun, and the slowness of a busy machine


class Attempt(NamedTuple):
    """One attempt: what its failure came to."""

    noticed_s: float
    empty_s: float
    codes: list[int]
    errors: list[str]
    outcome: dict[str, Any]
    first_nimg: int
    last_nimg: int


def nothing(story: Story) -> None:
    """Let be."""


class Story:
    """A run on a cluster, one attempt after the other."""

    def __init__(self, cluster: Cluster, config: Path, run: Path) -> None:
        self.cluster, self.config, self.run, self.attempts = cluster, config, run, 0
        self.env = environment() | {"PATH": f"{cluster.folder / 'bin'}:{environment()['PATH']}"}
        self.env.pop("GLOO_SOCKET_IFNAME", None)  # init finds it

    def script(self, *overrides: str) -> list[str]:
        sets = [f"--set={item}" for item in (f"output={self.run}", *overrides)]
        return [str(ROOT / "launch" / "train.py"), "--config", str(self.config), *sets]

    def deepspeed(self, size: int) -> list[list[str]]:
        shared = ["--hostfile", self.cluster.hostfile(size), "--master_addr", MASTER, "--master_port", str(PORT)]
        return [[str(BIN / "deepspeed"), "--no_ssh", "--node_rank", str(rank), *shared] for rank in range(size)]

    def plain(self, size: int) -> list[list[str]]:
        """Ranks as a launcher starts them, without it."""
        shared = [f"WORLD_SIZE={size}", f"MASTER_ADDR={MASTER}", f"MASTER_PORT={PORT}", "LOCAL_WORLD_SIZE=1"]
        return [["env", *shared, f"RANK={rank}", "LOCAL_RANK=0", sys.executable] for rank in range(size)]

    def torchrun(self, size: int) -> list[list[str]]:
        shared = ["--rdzv-backend=c10d", f"--rdzv-endpoint={MASTER}:{PORT}", "--rdzv-id=story"]
        return [
            [sys.executable, "-m", "warm_dist.distributed.torchrun", f"--nnodes={size}", "--nproc-per-node=1", *shared]
        ] * size

    def lines(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        records = map(parse_line, path.read_bytes().splitlines() if path.exists() else [])
        return [
            record for record in records if record and record["attempt"] == self.attempts and record["kind"] == "train"
        ]

    def begin(self) -> dict[str, str]:
        """The environment of the next attempt."""
        self.attempts += 1
        self.mark = f"{self.run}-{self.attempts}"
        return self.env | {MARK: self.mark}

    def on_nodes(self, commands: list[list[str]], *overrides: str) -> None:
        """Start an attempt by a command on each node."""
        env, names = self.begin(), self.cluster.names
        starts = zip(names, commands, strict=False)
        self.nodes = [self.cluster.start(name, [*command, *self.script(*overrides)], env) for name, command in starts]

    def over_ssh(self, size: int, *overrides: str) -> None:
        """Start an attempt by one command, DeepSpeed's runner, which finds MASTER_ADDR by `ssh node1 hostname -I`."""
        env = self.begin()
        variables = self.cluster.folder / "deepspeed_env"
        variables.write_text(f"OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n{MARK}={self.mark}\n")
        command = [str(BIN / "deepspeed"), "--hostfile", self.cluster.hostfile(size), "--master_port", str(PORT)]
        self.nodes = [
            subprocess.Popen(
                [*command, *self.script(*overrides)],
                env=env | {"DS_ENV_FILE": str(variables)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        ]

    def fail(self, fault: Callable[[Story], None], mend: Callable[[Story], None] = nothing) -> Attempt:
        """After some steps the fault; wait for the survivors' word, mend, wait until nothing is left."""
        try:
            wait_for("steps", lambda: len(self.lines()) >= STEPS or any(node.poll() is not None for node in self.nodes))
            fault(self)
            noticed_s = wait_for("a survivor's word", (self.run / "exit.json").exists)
            mend(self)
            empty_s = noticed_s + wait_for("nobody left", lambda: not marked(self.mark))
        except AssertionError as error:
            end_marked(self.mark)
            raise AssertionError("\n".join([str(error), *(node.communicate()[1] for node in self.nodes)])) from None
        said = [node.communicate(timeout=60)[1] for node in self.nodes]
        lines = self.lines()
        codes = [node.returncode for node in self.nodes]
        return Attempt(noticed_s, empty_s, codes, said, outcome(self.run), lines[0]["nimg"], lines[-1]["nimg"])

    def signal_rank(self, rank: int, signum: signal.Signals) -> None:
        (pid,) = [found.pid for found in marked(self.mark) if found.role == f"rank {rank}"]
        os.kill(pid, signum)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need()
    with Cluster(3, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in a local folder: no S3 server is needed inside the namespaces."""
    from data_pipelines.pack import pack
    from data_pipelines.sources.open import open_source

    folder = tmp_path_factory.mktemp("digits")
    pack(open_source("digits", 8), str(folder / "data"), None, shard_size=500)
    tree = {
        "output": "unset",
        "data": {
            "manifest": str(folder / "data" / "manifest.parquet"),
            "resolution": 8,
            "channels": 1,
            "num_classes": 10,
            "num_lanes": BATCH,
            "chunk": 16,
        },
        "process": {"bnr": 0.5},
        "network": {
            "arch": "ddpmpp",
            "channels": 16,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "attention_resolutions": [4],
        },
        "train": {
            "total_nimg": BATCH * 100_000,
            "batch_size": BATCH,
            "lr": 1e-3,
            "eps": 1e-4,
            "clip": 1.0,
            "label_dropout": 0.1,
            "ema_half_life_nimg": 1000,
            "log_nimg": BATCH,
            "save_nimg": BATCH * 5,
        },
        "parallel": {"zero_stage": 2, "timeout_s": TIMEOUT_S},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="module")
def story(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole life of the run: three failures, the end, and the losses of an unbroken run of one process."""
    story = Story(cluster, config, tmp_path_factory.mktemp("run") / "run")
    told: dict[str, Any] = {}
    story.on_nodes(story.deepspeed(3))
    told["node killed"] = story.fail(lambda s: s.nodes[2].kill())
    story.on_nodes(story.plain(2), "engine=local")
    told["link cut"] = story.fail(lambda s: cluster.link("node2", "down"), lambda s: cluster.link("node2", "up"))
    story.on_nodes(story.torchrun(3), "engine=local")
    told["rank hung"] = story.fail(
        lambda s: s.signal_rank(2, signal.SIGSTOP), lambda s: s.signal_rank(2, signal.SIGCONT)
    )
    total = f"train.total_nimg={told['rank hung'].last_nimg + BATCH * 5}"
    story.over_ssh(2, total)
    try:
        out, err = story.nodes[0].communicate(timeout=240)
    finally:
        end_marked(story.mark)
    told["end"] = (story.nodes[0].returncode, out, err)
    told["first after"], told["losses"] = story.lines()[0]["nimg"], losses(story.run)
    whole = story.run.with_name("whole")
    code, _, err = finish(fork(config, whole, total, "engine=local", "train.save_nimg=4800"))
    assert code == 0, err
    told["whole"] = losses(whole)
    return told


def survivors_end_resumably(attempt: Attempt) -> None:
    told = attempt.outcome
    print(f"told after {attempt.noticed_s:.1f} s, nothing left after {attempt.empty_s:.1f} s: {told['reason']}")
    for node, (code, said) in enumerate(zip(attempt.codes, attempt.errors, strict=True), 1):
        print(f"node{node} ended with {code}:", *[line for line in said.splitlines() if "UnreachableError" in line])
    assert (told["code"], told["resumable"]) == (errors.UnreachableError.exit_code, True), told
    assert told["reason"].startswith("UnreachableError: ")
    assert 0 not in attempt.codes


def test_a_killed_node_is_named_by_the_survivors_at_once(story):
    attempt = story["node killed"]
    survivors_end_resumably(attempt)
    assert attempt.outcome["reason"].startswith("UnreachableError: rank 2 (host node3) has been silent for")
    assert "last at '" in attempt.outcome["reason"]
    assert attempt.noticed_s < TIMEOUT_S  # by the broken connection and three missing beats, not by the timeout
    assert attempt.errors[0].count("UnreachableError: rank 2 (host node3)") == 1
    assert "UnreachableError" not in attempt.errors[1]  # one rank speaks


def test_a_cut_link_is_noticed_in_time_on_both_sides(story):
    attempt = story["link cut"]
    survivors_end_resumably(attempt)
    assert "(host node2)" in attempt.outcome["reason"]
    assert "of nimg" in attempt.outcome["reason"]
    assert attempt.noticed_s < NOTICED_S
    assert all("UnreachableError: " in said for said in attempt.errors)


def test_a_hung_rank_is_named_and_ends_too_when_it_wakes(story):
    attempt = story["rank hung"]
    survivors_end_resumably(attempt)
    assert attempt.outcome["reason"].startswith("UnreachableError: rank 2 (host node")
    assert "has been silent for" in attempt.outcome["reason"]
    assert attempt.noticed_s < NOTICED_S


def test_the_same_command_goes_on_over_ssh_and_ends(story):
    code, out, err = story["end"]
    assert code == 0, err
    assert "node1: finished: " in out


def test_every_attempt_goes_on_from_the_last_checkpoint(story):
    """At most five steps are done twice."""
    attempts = [story[name] for name in ("node killed", "link cut", "rank hung")]
    begun = [*(attempt.first_nimg for attempt in attempts[1:]), story["first after"]]
    for attempt, first in zip(attempts, begun, strict=True):
        assert first % (BATCH * 5) == BATCH
        assert attempt.last_nimg - BATCH * 5 < first <= attempt.last_nimg + BATCH


def test_the_loss_curve_is_that_of_an_unbroken_run_of_one_process(story):
    """Every image at its place: another order, a lost or a doubled batch would change a loss by a percent."""
    found, whole = story["losses"], story["whole"]
    assert len(found) == len(whole) > 2 * STEPS  # of three times STEPS some were done twice
    off = [abs(a - b) / b for a, b in zip(found, whole, strict=True)]
    print(f"off by {max(off):.1e} in {len(off)} steps")
    assert max(off) < 5e-6  # the bound of all tests of world sizes
