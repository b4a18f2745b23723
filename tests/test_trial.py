"""A trial without Ray: its command, its config, and the process that is followed by its metrics.jsonl."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.processes import wait_for
from tests.sweeps import EVERY, TOTAL, pack_digits, write_sweep
from warm_dist import errors
from warm_dist.config.run import validate
from warm_dist.config.sweep import SweepConfig, TrialConfig, load_sweep
from warm_dist.files import read_json
from warm_dist.sweeps.trial_process import SweepPaths, TrialRun, command, environment, make_paths, run_config
from warm_dist.sweeps.trials import Trial, trials

ONE = TrialConfig()


def first(path: Path, *overrides: str) -> tuple[SweepConfig, Trial]:
    sweep, base = load_sweep(path, list(overrides))
    return sweep, trials(sweep, base)[0]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pack_digits(tmp_path_factory.mktemp("data"))


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
    assert words[1:3] == ["-m", "torch.distributed.run"]
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


def follow(run: TrialRun, timeout_s: float = 120) -> list[int]:
    """Report all evaluations until the end, or until time is up."""
    reported = []

    def done() -> bool:
        end = run.end()
        for record in run.evaluations(end is not None and end.code == 0):
            run.report(record["nimg"])
            reported.append(record["nimg"])
        return end is not None

    wait_for("the trial's end", done, timeout_s)
    return reported


@pytest.mark.slow
def test_the_life_of_a_trial(tmp_path, manifest):
    """Killed at its first evaluation; started again; ended by its owner; finished. Each evaluation is told a driver once."""
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


@pytest.mark.slow
def test_the_last_evaluation_waits_for_the_weights(tmp_path, manifest):
    sweep, trial = first(write_sweep(tmp_path, manifest, {}))
    run = TrialRun(trial, make_paths(sweep, "f00d", None), ONE, "one")
    run.start()
    early: list[int] = []

    def ended() -> bool:
        early.extend(record["nimg"] for record in run.evaluations(False))
        return run.end() is not None

    wait_for("its end", ended)
    assert TOTAL not in early
    assert [record["nimg"] for record in run.evaluations(True)][-1] == TOTAL
    assert (run.run / "weights" / "ema.safetensors").exists()
    run.close()


@pytest.mark.slow
def test_an_early_end_saves_and_takes_seconds(tmp_path, manifest):
    sweep, trial = first(write_sweep(tmp_path, manifest, {}, {"train.total_nimg": 1_600_000, "train.log_nimg": 160}))
    run = TrialRun(trial, make_paths(sweep, "f00d", None), ONE, "one")
    run.start()
    wait_for("an evaluation", lambda: next(run.evaluations(False), None) is not None)
    began = time.monotonic()
    run.close()
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 10
    end = read_json(run.run / "exit.json")
    assert (end["code"], end["resumable"]) == (errors.Stopped.exit_code, True)
    assert not children_of(run)


@pytest.mark.slow
def test_a_config_that_cannot_run_is_final(tmp_path, manifest):
    sweep, trial = first(write_sweep(tmp_path, str(tmp_path / "nowhere" / "manifest.parquet"), {}))
    run = TrialRun(trial, make_paths(sweep, "f00d", None), ONE, "one")
    run.start()
    assert follow(run) == []
    end = run.end()
    assert (end.code, end.final) == (errors.DataError.exit_code, True)
    assert "nowhere/manifest.parquet" in end.reason
    run.close()


def test_a_run_that_somebody_else_holds_is_waited_for_and_then_told(tmp_path, manifest, monkeypatch):
    from warm_dist.errors import UnreachableError
    from warm_dist.runs.folder import claim_run
    from warm_dist.sweeps import trial_process

    sweep, trial = first(write_sweep(tmp_path, manifest, {}))
    run = TrialRun(trial, make_paths(sweep, "f00d", None), ONE, "one")
    monkeypatch.setattr(trial_process, "FREE_S", 0.5)
    _, lock = claim_run(run.run)
    with lock, pytest.raises(UnreachableError, match="another process still trains in it"):
        run.start()
    assert json.loads(json.dumps(run.config))["output"] == str(run.run)


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


def test_relative_outputs_are_absolute_from_the_start(tmp_path, manifest, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep, _ = first(write_sweep(tmp_path, manifest, {}), "output=here/sweep", "node_dir=node")
    place: SweepPaths = make_paths(sweep, "f00d", None)
    assert (place.output, place.node_dir, place.cwd) == (f"{tmp_path}/here/sweep", f"{tmp_path}/node", str(tmp_path))
