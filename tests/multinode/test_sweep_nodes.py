"""Sweeps on a Ray cluster of two machines with token authentication: refused, one trial on both, one machine lost.

The machines are those of tests/multinode/nodes.py. Ray's processes of a machine and the sweep's command, which looks for
them in /proc, share its process ids. A Ray cluster is up in 10 s, so one serves all stories, which end with the loss.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.multinode.nodes import Cluster, need
from tests.support.processes import MARK, end_marked, marked, wait_for
from tests.support.sweeps import EVERY, TOTAL, evaluations, pack_digits, states, trial_named, write_sweep
from tests.support.training import environment
from warm_dist import errors
from warm_dist.files import read_json
from warm_dist.runs.metrics import read_metrics

pytestmark = pytest.mark.timeout(500)
HEAD, RAY = "10.77.0.1:6379", str(Path(sys.executable).parent / "ray")
CPUS = 2  # of each machine, for Ray: two processes of one CPU fit a machine, two trials of two CPUs do not
# A machine without power is found out after 3 x (1 + 3) s, with Ray's own numbers after 5 x (3 + 10) s
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


class Sweep(NamedTuple):
    """A sweep that has ended: its code, what it said, how long it took."""

    output: Path
    code: int
    said: str
    seconds: float


class RayCluster:
    """Two machines with Ray."""

    def __init__(self, cluster: Cluster, folder: Path, scratch: Path) -> None:
        self.cluster, self.folder, self.mark = cluster, folder, str(folder)
        self.manifest = pack_digits(folder)
        inherited = {name: value for name, value in environment().items() if not name.startswith("RAY_")}
        inherited.pop("GLOO_SOCKET_IFNAME", None)  # init finds it
        self.env = inherited | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token("token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # else 15, which on a busy machine is half a minute more a trial
            "OMP_WAIT_POLICY": "PASSIVE",  # both machines' trials have two threads, and this one may have two cores
            MARK: self.mark,
        }
        shared = ["--block", "--disable-usage-stats", f"--num-cpus={CPUS}", f"--object-store-memory={80 << 20}"]
        first = ["--head", "--port=6379", "--include-dashboard=false", "--node-ip-address=10.77.0.1"]
        second = [f"--address={HEAD}", "--node-ip-address=10.77.0.2"]
        self.nodes = [
            cluster.start(name, [RAY, "start", *own, *shared, f"--temp-dir={scratch / name}"], self.env | HEALTH)
            for name, own in (("node1", first), ("node2", second))
        ]
        for node in self.nodes:
            started(node)

    def token(self, name: str) -> str:
        """A new one's file."""
        path = self.folder / name
        path.write_text(secrets.token_hex(32))
        path.chmod(0o600)
        return str(path)

    def start(self, name: str, space: Mapping[str, Any], env: Mapping[str, str] | None = None, **more: Any) -> Path:
        """Start a sweep by its command on node1; returns its output, beside which `log` grows."""
        config = write_sweep(self.folder / name, self.manifest, space, **more)
        command = [sys.executable, "launch/sweep.py", "--config", str(config)]
        self.cluster.join(self.nodes[0], command, self.env | {"RAY_ADDRESS": HEAD} | dict(env or {}), log(config))
        return config.parent / "sweep"

    def end(self, output: Path) -> Sweep:
        """Wait for a sweep's end."""
        seconds = wait_for(f"the end of {output}", lambda: "\nexit " in log(output).read_text(), 200)
        said, _, code = log(output).read_text().rpartition("\nexit ")
        print(said)
        wait_for("no trial's process left, though Ray is", lambda: not training(self.mark), 30)
        return Sweep(output, int(code), said, seconds)


def log(path: Path) -> Path:
    """What the sweep in this folder says."""
    return path.with_name("log")


def started(node: subprocess.Popen[str]) -> None:
    """Read what `ray start` says until its Ray runs."""
    assert node.stdout
    assert node.stderr
    for line in node.stdout:
        if "Ray runtime started" in line:
            return
    raise AssertionError(f"no Ray: {node.stderr.read()}")


def training(mark: str, word: str = "launch.train") -> list[int]:
    """The pids of trials' processes, on both machines."""
    found = []
    for pid, _ in marked(mark):
        with suppress(OSError):
            if word in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


def hosts(run: Path) -> set[str]:
    """Where the ranks of a run last beat."""
    return {beat["host"] for path in (run / "heartbeat").glob("rank_*.json") if (beat := read_json(path))}


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    need()
    folder = tmp_path_factory.mktemp("ray")
    scratch = Path(tempfile.mkdtemp(prefix="wdray"))  # short: Ray's sockets lie there, of 107 bytes at most
    try:
        with Cluster(2, folder / "cluster") as cluster:
            began = time.monotonic()
            ray = RayCluster(cluster, folder, scratch)
            print(f"two machines with Ray after {time.monotonic() - began:.1f} s")
            yield ray
        wait_for("nobody left", lambda: not marked(str(folder)), 30)
    finally:
        end_marked(str(folder))
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def refused(ray: RayCluster) -> Sweep:
    """A sweep with another token."""
    return ray.end(
        ray.start("refused", {"process.bnr": {"grid": [0.5]}}, {"RAY_AUTH_TOKEN_PATH": ray.token("another")})
    )


@pytest.fixture(scope="module")
def spread(ray: RayCluster) -> Sweep:
    """A sweep of one trial, on both machines."""
    return ray.end(
        ray.start("spread", {"process.bnr": {"grid": [0.5]}}, trial={"nodes": 2}, set={"train.total_nimg": 2 * EVERY})
    )


@pytest.fixture(scope="module")
def orphaned(ray: RayCluster, spread: Sweep) -> tuple[Path, float]:
    """A sweep of one trial on both machines, whose command is killed; how long its processes were still there."""
    output = ray.start(
        "orphaned", {"process.bnr": {"grid": [0.5]}}, trial={"nodes": 2}, set={"train.total_nimg": 1600_000}
    )
    wait_for("a checkpoint", lambda: any(output.glob("trials/*/checkpoints/*/COMPLETE")))
    assert len(training(ray.mark)) >= 2
    for pid in training(ray.mark, "launch/sweep.py"):
        os.kill(pid, signal.SIGKILL)
    return output, wait_for("no trial's process left, though Ray is", lambda: not training(ray.mark), 60)


@pytest.fixture(scope="module")
def lost(ray: RayCluster, refused: Sweep, spread: Sweep, orphaned: tuple[Path, float]) -> dict[str, Any]:
    """A sweep of three trials, one at a time on each machine; node2's power is cut when its trial has saved."""
    space = {"process.bnr": {"grid": [0.5, 0, 1]}}
    output = ray.start("lost", space, trial={"cpus_per_process": CPUS, "max_failures": 1})
    found: dict[str, Path] = {}

    def under_way() -> bool:
        found.clear()
        for run in (output / "trials").glob("*"):
            if not (run / "ended.json").exists():
                found.update(dict.fromkeys(hosts(run), run))
        saved = len(found) == 2 and any(found["node2"].glob("checkpoints/*/COMPLETE"))
        return saved and len(evaluations(found["node2"])) < 3  # far from its end

    wait_for("trials on both machines, a checkpoint of the one on node2", under_way)
    assert training(ray.mark)
    finished = {path.parent.name for path in (output / "trials").glob("*/ended.json")}
    ray.cluster.link("node2", "down")  # first, so that nobody is told
    ray.nodes[1].kill()
    print(f"no power on node2 with {found['node2'].name}, under way on node1 {found['node1'].name}, ended {finished}")
    noticed_s = wait_for("a word of the loss", lambda: "crashed (" in log(output).read_text(), 120)
    print(f"noticed after {noticed_s:.1f} s")
    return {"run": found["node2"], "noticed_s": noticed_s, "sweep": ray.end(output)}


def test_another_token_is_refused_and_nothing_starts(refused):
    print(f"refused after {refused.seconds:.1f} s")
    assert refused.code == errors.UnreachableError.exit_code
    told = [line for line in refused.said.splitlines() if not line.startswith(("sweep: 1 trial, 0 have ended", "["))]
    assert len(told) == 1, refused.said  # beside a warning of Ray's own, with the time in brackets
    assert told[0].startswith(f"UnreachableError: Ray at {HEAD}: ")
    assert "token is missing or incorrect" in told[0]
    assert not (refused.output / "trials").exists()
    assert refused.seconds < 60


def test_a_trial_of_two_nodes_runs_on_both(spread):
    """Both processes fit node1, so that one is on node2 is the sweep's doing."""
    print(f"ended after {spread.seconds:.1f} s")
    assert spread.code == errors.EXIT_OK, spread.said
    assert f"a trial takes 1 CPU on 2 of 2 machines, the largest with {CPUS} CPU" in spread.said
    run = trial_named(spread.output, "bnr=0.5")
    assert read_json(run / "run.json")["world_size"] == 2
    beats = [read_json(run / "heartbeat" / f"rank_{rank}.json") for rank in range(2)]
    assert [beat["nimg"] for beat in beats] == [2 * EVERY] * 2
    assert {beat["host"] for beat in beats} == {"node1", "node2"}
    assert [end["state"] for end in states(spread.output).values()] == ["finished"]
    assert evaluations(run) == [(EVERY, 1), (2 * EVERY, 1)]


def test_no_machine_trains_for_a_sweep_that_is_gone(orphaned):
    output, seconds = orphaned
    print(f"nothing of the killed sweep was left on both machines after {seconds:.1f} s")
    assert seconds < 10
    assert not list(output.glob("trials/*/ended.json"))


def test_a_machine_lost_mid_sweep_costs_its_trial_an_attempt(lost):
    sweep, run = lost["sweep"], lost["run"]
    assert sweep.code == errors.EXIT_OK, sweep.said
    assert {end["state"] for end in states(sweep.output).values()} == {"finished"}
    assert len(states(sweep.output)) == 3
    assert sweep.said.count("crashed (") == 1
    assert re.search(rf"{re.escape(run.name)}  crashed \(\w+: .*\); restarts from its last checkpoint", sweep.said)
    assert lost["noticed_s"] < 30  # 12 s by HEALTH, and a busy machine


def test_the_lost_trial_goes_on_from_its_checkpoint_on_the_other_machine(lost):
    run = lost["run"]
    assert read_json(run / "run.json")["attempt"] == 2
    assert hosts(run) == {"node1"}
    found = evaluations(run)
    assert [nimg for nimg, _ in found] == list(range(EVERY, TOTAL + 1, EVERY))  # rising, each once
    assert [attempt for _, attempt in found] == sorted(attempt for _, attempt in found)
    assert found[-1][1] == 2
    steps = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    assert min(record["nimg"] for record in steps if record["attempt"] == 2) > EVERY  # not from the start


def test_the_other_trials_ran_once(lost):
    others = [run for run in (lost["sweep"].output / "trials").iterdir() if run != lost["run"]]
    assert len(others) == 2
    for run in others:
        assert read_json(run / "run.json")["attempt"] == 1
        assert evaluations(run) == [(nimg, 1) for nimg in range(EVERY, TOTAL + 1, EVERY)]
