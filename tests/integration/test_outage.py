"""A training run beside an MLflow server that is killed, comes back, and hangs: the run never waits, nothing is lost or doubled."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from launch import services as servers
from launch.services import Services, services
from tests.support.processes import wait_for
from tests.support.training import ENDLESS, finish, fork
from warm_dist import supervisor
from warm_dist.errors import Stopped
from warm_dist.files import read_json
from warm_dist.runs.metrics import read_metrics
from warm_dist.tracking.client import CLIENT_ENV

if TYPE_CHECKING:
    from subprocess import Popen

WARM_UP_S = 2.0


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Services]:
    with services(tmp_path / "services") as started:
        yield started


def again(mortal: Services, log: Path) -> Popen[bytes]:
    """The same server, on the same port and database."""
    root, port = log.parent, int(mortal.mlflow_url.rpartition(":")[2])
    process = supervisor.start(servers._command(root, port), servers._environment(mortal.s3), log)
    servers._wait_until_healthy(mortal.mlflow_url, process, log)
    return process


def tree(server: Popen[bytes]) -> list[psutil.Process]:
    """The supervisor and the server's own processes."""
    supervisor = psutil.Process(server.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def seconds_of_steps(run: Path, begun: float, ended: float) -> list[float]:
    """step_s of the lines written in this time, the first left out: it began before."""
    lines = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train" and begun < r["time"] < ended]
    return [line["step_s"] for line in lines[1:]]


def queued_s(pid: int) -> float:
    """How long a process's main thread has stood ready to run while others had the processors: not a wait for a server."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9


@pytest.mark.parametrize(
    ("calm_s", "down_s", "hang_s"),
    [(2.0, 4.0, 4.0), pytest.param(30.0, 120.0, 90.0, marks=pytest.mark.soak)],
    ids=["short", "minutes"],
)
def test_a_server_that_dies_comes_back_and_hangs(
    mortal: Services, config_file: Path, tmp_path: Path, calm_s: float, down_s: float, hang_s: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Fault: a training step that waits for MLflow, or a value that an outage loses or doubles."""
    run, log = tmp_path / "run", tmp_path / "services" / "mlflow.log"
    overrides = ["engine=local", ENDLESS, "train.log_nimg=64", "train.save_nimg=800000"]
    tracking = [f"tracking.mlflow_url={mortal.mlflow_url}", "tracking.experiment=outage"]
    train = fork(config_file, run, *overrides, *tracking)
    server: Popen[bytes] | None = None
    phases: dict[str, tuple[float, float]] = {}
    queued: dict[str, float] = {}

    def phase(name: str, seconds: float) -> None:
        begun, before = time.time(), queued_s(train.pid)
        time.sleep(seconds)  # this is what is tested: time passing
        phases[name] = (begun, time.time())
        queued[name] = (queued_s(train.pid) - before) / (time.time() - begun)

    try:
        wait_for("steps", lambda: len(read_metrics(run / "metrics.jsonl")) >= 4 or train.poll() is not None)
        time.sleep(WARM_UP_S)
        phase("server there", calm_s)
        for process in tree(mortal.mlflow):
            process.kill()
        phase("server killed", down_s)
        server = again(mortal, log)
        phase("server back", calm_s)
        for process in tree(server):
            process.suspend()
        phase("server hanging", hang_s)
        for process in tree(server):
            process.resume()
        phase("server answers again", calm_s)
        train.send_signal(signal.SIGTERM)
        code, _, err = finish(train)
        assert code == Stopped.exit_code, err[-2000:]
        for name, value in CLIENT_ENV.items():
            monkeypatch.setenv(name, value)
        check(run, mortal.mlflow_url, phases, queued)
    finally:
        train.kill()
        if server is not None:
            supervisor.stop(server)


def check(run: Path, url: str, phases: dict[str, tuple[float, float]], queued: dict[str, float]) -> None:
    """queued: the share of each phase in which training stood in line for a processor: a server that starts takes one too."""
    steps = {name: seconds_of_steps(run, *times) for name, times in phases.items()}
    medians = {name: statistics.median(values) * (1 - queued[name]) for name, values in steps.items()}
    for name, median in medians.items():
        print(f"{name:>22}: {1e3 * median:.2f} ms a step, median of {len(steps[name])} lines without {queued[name]:.0%} in line, longest {1e3 * max(steps[name]):.2f}")  # fmt: skip
    calm = medians["server there"]
    # twice is far from what a wait would do: one request that hangs is a minute
    assert all(median < 2 * calm for median in medians.values()), medians
    lines = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    gaps = [b["time"] - a["time"] for a, b in pairwise(lines)]
    assert max(gaps) < 20, "no line came late"

    from mlflow import MlflowClient

    client: Any = MlflowClient(tracking_uri=url)
    run_id = wait_for_end(client, run)
    for key in lines[0].keys() - {"time", "attempt", "nimg", "kind"}:
        held = [(m.step, m.value) for m in client.get_metric_history(run_id, f"train/{key}")]
        assert sorted(held) == [(r["nimg"], r[key]) for r in lines if r[key] is not None], key
    system = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert len(system) == len(lines)


def wait_for_end(client: Any, run: Path) -> str:
    """The one MLflow run, when the mirror has set its end."""
    deadline = time.monotonic() + 200  # a request that hung is given up after a minute
    while True:
        experiment = client.get_experiment_by_name("outage")
        runs = (
            client.search_runs([experiment.experiment_id]) if experiment else []
        )  # a busy machine's mirror starts late
        if runs and runs[0].info.status == "KILLED":
            (found,) = runs
            assert (read_json(run / "mirror.json") or {})["run_id"] == found.info.run_id
            return str(found.info.run_id)
        assert time.monotonic() < deadline, (run / "mirror.log").read_text()
        time.sleep(0.5)
