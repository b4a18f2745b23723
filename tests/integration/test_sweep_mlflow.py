"""A sweep in MLflow: its run, the trials under it, the axes of parallel coordinates, the results, the best one's model."""

from __future__ import annotations

import time

import pytest

from tests.support.sweeps import EVERY, TOTAL, Command, pack_digits, write_sweep
from warm_dist import errors

pytestmark = pytest.mark.timeout(400)


def test_a_sweep_is_a_run_and_its_trials_are_under_it(running, client, tmp_path):
    manifest = pack_digits(tmp_path)
    config = write_sweep(
        tmp_path,
        manifest,
        {"process.bnr": {"grid": [0, 0.1]}},
        {"tracking.mlflow_url": running.mlflow_url, "tracking.experiment": "sweeps"},
        registered_model="digits",
        surface={"nfe": [4], "num_images": 64},
    )
    sweep = Command(config, env=running.s3.env)
    code, said = sweep.end()
    print(said)
    assert code == errors.EXIT_OK
    experiment = client.get_experiment_by_name("sweeps").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`mlflow.runName` = 'sweep'")
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert (parent.info.status, len(children)) == ("FINISHED", 2)
    names = [run.info.run_name.rpartition("-")[0] for run in children]
    by_name = dict(zip(names, children, strict=True))
    logs = {name: float(run.data.params["log10_bnr"]) for name, run in by_name.items()}
    assert logs == {"bnr=0,seed=0": -3, "bnr=0.1,seed=0": -1}  # BNR 0 below the others
    for run in children:
        assert run.info.status == "FINISHED"
        held = client.get_metric_history(run.info.run_id, "eval/frechet")
        assert [metric.step for metric in held] == list(range(EVERY, TOTAL + 1, EVERY))
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= {
        "table.txt",
        "table.csv",
        "trials.parquet",
        "best.json",
        "bnr.png",
        "curves.png",
    }
    best = min(children, key=lambda run: run.data.metrics["eval/frechet"])
    assert parent.data.metrics["best/frechet"] == best.data.metrics["eval/frechet"]
    assert parent.data.metrics["trials/finished"] == 2
    (version,) = client.search_model_versions("name = 'digits'")
    assert version.run_id == best.info.run_id

    code, _ = Command(config, "--resume", env=running.s3.env).end()  # all is there: nothing is made twice
    assert code == errors.EXIT_OK
    assert len(client.search_runs([experiment])) == 3
    assert [v.version for v in client.search_model_versions("name = 'digits'")] == ["1"]


def test_a_server_that_is_down_is_told_before_anything_starts(tmp_path):
    manifest = pack_digits(tmp_path)
    config = write_sweep(tmp_path, manifest, {}, {"tracking.mlflow_url": "http://127.0.0.1:9"})
    began = time.monotonic()
    code, said = Command(config).end(60)
    print(f"told after {time.monotonic() - began:.1f} s: {said}")
    assert (code, said.count("\n")) == (errors.UnreachableError.exit_code, 1)
    assert "MLflow at http://127.0.0.1:9" in said
    assert not (tmp_path / "sweep" / "trials").exists()
