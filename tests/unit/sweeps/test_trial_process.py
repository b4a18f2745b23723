"""A trial without Ray: its command, its environment, its config and where it lies."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.packed import Packed
from tests.support.sweeps import EVERY, TOTAL, write_sweep
from tests.support.trials import ONE, first
from warm_dist import errors
from warm_dist.config.run import validate
from warm_dist.config.sweep import TrialConfig
from warm_dist.runs.folder import Claim, write_end
from warm_dist.runs.metrics import MetricsLog
from warm_dist.sweeps.trial_process import SweepPaths, TrialRun, command, environment, make_paths, run_config


@pytest.fixture
def manifest(digits: Packed) -> str:
    return digits.manifest_url


def test_one_process_is_plain_python_and_more_are_torchrun():
    config = Path("/x/trial.json")
    assert command(config, ONE, 0, "127.0.0.1", 1) == [
        sys.executable,
        "-m",
        "launch.train",
        "--config",
        "/x/trial.json",
    ]
    words = command(config, TrialConfig(nodes=2, processes_per_node=4), 1, "10.0.0.1", 29500)
    assert words[1:3] == ["-m", "warm_dist.distributed.torchrun"]
    assert words[3:] == [
        *("--nnodes=2", "--nproc-per-node=4", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29500"),
        *("-m", "launch.train", "--config", "/x/trial.json"),
    ]


def test_a_trial_has_the_threads_and_devices_that_it_asked_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    on_cpu, on_gpu = environment(TrialConfig(cpus_per_process=3)), environment(TrialConfig(gpus_per_process=1))
    assert (on_cpu["OMP_NUM_THREADS"], on_cpu["CUDA_VISIBLE_DEVICES"], on_cpu["DS_ACCELERATOR"]) == ("3", "", "cpu")
    assert (on_gpu["OMP_NUM_THREADS"], on_gpu["CUDA_VISIBLE_DEVICES"], on_gpu.get("DS_ACCELERATOR")) == ("1", "3", None)
    assert "RAY_AUTH_TOKEN" not in on_cpu | on_gpu


def test_what_ray_sets_aside_is_what_the_processes_use():
    assert TrialConfig(processes_per_node=4, cpus_per_process=3, gpus_per_process=1).bundle == {"CPU": 12.0, "GPU": 4.0}
    assert TrialConfig(gpus_per_process=0.25).bundle == {"CPU": 1.0, "GPU": 0.25}
    assert ONE.bundle == {"CPU": 1.0}


def test_a_trial_s_config_is_a_run_s_in_its_place(tmp_path, manifest):
    sweep, trial = first(
        write_sweep(tmp_path, manifest, {"process.bnr": {"grid": [0.5]}}, {"tracking.mlflow_url": "http://127.0.0.1:1"})
    )
    place = make_paths(sweep, "f00d", "a" * 32)
    tree = run_config(trial, place)
    config = validate(tree)
    assert config.output == f"{tmp_path}/sweep/trials/{trial.name}"
    assert (config.checkpoint.url, config.data.cache_dir) == (None, None)  # a local data set needs no cache
    assert config.eval.cache_dir == f"{tmp_path}/node"
    assert (config.tracking.parent_run_id, config.tracking.run_name) == ("a" * 32, trial.name)
    assert not config.tracking.log_model
    far, trial = first(
        write_sweep(tmp_path, "s3://b/d/manifest.parquet", {}, output="s3://b/sweep/", endpoint_url="http://e:1")
    )
    config = validate(run_config(trial, make_paths(far, "f00d", None)))
    assert config.output == f"{tmp_path}/node/f00d/{trial.name}"
    assert (config.checkpoint.url, config.checkpoint.endpoint_url) == (
        f"s3://b/sweep/trials/{trial.name}",
        "http://e:1",
    )
    assert config.data.cache_dir == f"{tmp_path}/node/data"


def test_a_run_that_somebody_else_holds_is_waited_for_and_then_told(tmp_path, manifest, monkeypatch):
    from warm_dist.errors import UnreachableError
    from warm_dist.sweeps import trial_process as module

    sweep, trial = first(write_sweep(tmp_path, manifest, {}))
    run = TrialRun(trial, make_paths(sweep, "f00d", None), ONE, "one")
    monkeypatch.setattr(module, "FREE_S", 0.5)
    held = Claim.take(run.run)
    with pytest.raises(UnreachableError, match="another process still trains in it"):
        run.start()
    held.release()
    assert json.loads(json.dumps(run.config))["output"] == str(run.run)


def test_relative_outputs_are_absolute_from_the_start(tmp_path, manifest, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep, _ = first(write_sweep(tmp_path, manifest, {}), "output=here/sweep", "node_dir=node")
    place: SweepPaths = make_paths(sweep, "f00d", None)
    assert (place.output, place.node_dir, place.cwd) == (f"{tmp_path}/here/sweep", f"{tmp_path}/node", str(tmp_path))


@pytest.fixture
def unstarted(tmp_path, manifest) -> TrialRun:
    sweep, trial = first(write_sweep(tmp_path, manifest, {}))
    return TrialRun(trial, make_paths(sweep, "f00d", None), ONE, "one")


def write_evaluations(run: TrialRun, *steps: int) -> None:
    log = MetricsLog(run.run / "metrics.jsonl", 1)
    for nimg in steps:
        log.write(nimg, "eval", frechet=1.0)


def test_each_evaluation_is_told_once_and_the_last_when_the_run_has_finished(unstarted):
    """Told early, the last one would end the trial before its weights are written."""
    write_evaluations(unstarted, EVERY, TOTAL)
    assert [record["nimg"] for record in unstarted.evaluations(finished=False)] == [EVERY]
    unstarted.report(EVERY)
    assert list(unstarted.evaluations(finished=False)) == []
    assert [record["nimg"] for record in unstarted.evaluations(finished=True)] == [TOTAL]


@pytest.mark.parametrize(("session", "told"), [("one", [2 * EVERY]), ("two", [EVERY, 2 * EVERY])])
def test_the_same_driver_is_not_told_again_and_another_one_is(unstarted, session, told):
    unstarted.report(EVERY)
    write_evaluations(unstarted, EVERY, 2 * EVERY)
    again = TrialRun(unstarted.trial, unstarted.paths, ONE, session)
    assert [record["nimg"] for record in again.evaluations(finished=False)] == told


@pytest.mark.parametrize(
    ("error", "final"),
    [(errors.ConfigError("x"), True), (errors.DataError("x"), True), (errors.NumericsError("x"), True),
     (errors.CheckpointError("x"), True), (errors.WorldSizeError("x"), True), (errors.UnreachableError("x"), False),
     (errors.Stopped("x"), False), (errors.OutputError("x"), False), (RuntimeError("x"), False)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_may_go_better_next_time_is_not_final(unstarted, error, final):
    """An outage or a crash is tried again; what the same command would meet again is not."""
    unstarted._begun, unstarted._process = time.time(), SimpleNamespace(poll=lambda: 1)
    write_end(unstarted.run, 1, 0, error)
    assert unstarted.end().final == final
