"""What is no training in MLflow: a computation, a sweep above its trials, an evaluation below its training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launch import evaluate
from launch.services import Services
from tests.support.mirrored_run import STEPS, log, make_run
from warm_dist.errors import ConfigError
from warm_dist.files import read_json
from warm_dist.supervisor import free_port
from warm_dist.tracking.client import log_finished, open_parent
from warm_dist.tracking.mirror import Mirror


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder at its first attempt, nothing logged yet; its MLflow experiment has the test's name."""
    return make_run(tmp_path / "run", "http://user:hunter2@127.0.0.1:1/?token=hunter2")


def test_a_computation_that_is_no_training_is_one_finished_run(running: Services, client: Any, tmp_path: Path) -> None:
    picture = tmp_path / "spectrum.json"
    picture.write_text("{}")
    secret = "s3://key:hunter2@bucket/manifest.parquet"

    def send(identity: str, metrics: dict[tuple[str, int], float]) -> str:
        return log_finished(
            *(running.mlflow_url, tmp_path.name, "spectrum-1", identity),
            params={"manifest": secret}, metrics=metrics, files=[picture],
        )  # fmt: skip

    run_id = send("a", {("bnr", 0): 0.4})
    assert send("a", {("bnr", 0): 0.5, ("bnr", 9): 0.6}) == run_id, "what is new of the same computation"
    assert send("b", {}) != run_id
    found = client.get_run(run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "spectrum-1")
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "bnr")] == [(0, 0.4), (9, 0.6)]
    assert found.data.params == {"manifest": "s3://bucket/manifest.parquet"}
    assert [file.path for file in client.list_artifacts(run_id)] == ["spectrum.json"]
    assert client.get_experiment(found.info.experiment_id).name == tmp_path.name
    with pytest.raises(ConfigError, match="needs the URL of a server"):
        log_finished("sqlite:///mlflow.db", "x", "y", "z", params={}, metrics={}, files=[])


def test_a_trial_is_one_run_under_its_parent_through_all_retries(running: Services, client: Any, run: Path) -> None:
    url, experiment = running.mlflow_url, run.parent.name
    parent = open_parent(url, experiment, "sweep", "sweep-1", {"space": "bnr"})
    assert open_parent(url, experiment, "sweep", "sweep-1", {"space": "bnr"}) == parent
    log(run, STEPS[:10])
    Mirror(run, url, experiment, "trial", parent).sync(running=True)
    (run / "mirror.json").unlink()
    log(run, STEPS[10:20], attempt=2)
    Mirror(run, url, experiment, "trial", parent).sync(running=True)
    identifier = client.get_experiment_by_name(experiment).experiment_id
    trials = client.search_runs([identifier], f"tags.mlflow.parentRunId = '{parent}'")
    assert [trial.info.run_name for trial in trials] == ["trial"]
    assert len(client.search_runs([identifier])) == 2
    assert len(client.get_metric_history(trials[0].info.run_id, "train/loss")) == 20


def test_an_evaluation_is_a_run_under_its_training(
    running: Services, client: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One curve over NFE for each BNR; done again it is the same run, with more blocks or another sampler another."""
    log(run, STEPS[:5])
    Mirror(run, running.mlflow_url, run.parent.name).sync(running=True)
    tracking = SimpleNamespace(mlflow_url=running.mlflow_url, experiment=run.parent.name)
    network: Any = SimpleNamespace(config=SimpleNamespace(tracking=tracking), weights=run, say=print)
    (tmp_path / "table.csv").write_text("bnr,nfe\n")

    def send(eta: float, blocks: int, url: str | None = None) -> None:
        facts = {"name": "Fréchet distance (lite0)", "measure": "m", "num_images": 64, "sha256": "s", "method": "heun"}
        lines = [
            facts | {"bnr": bnr, "nfe": nfe, "frechet": 10.0 * nfe + float(bnr), "floor": 1.0, "sampler": f"eta {eta}"}
            | {"spec": f"{bnr}-{nfe}-{eta}", "per_block": [{}] * blocks}
            for bnr in ("0", "0.5") for nfe in (9, 35)
        ]  # fmt: skip
        evaluate._log(network, lines, cast(Any, SimpleNamespace(mlflow_url=url, out=tmp_path)))

    def children() -> list[Any]:
        parent = f"tags.mlflow.parentRunId = '{read_json(run / 'mirror.json')['run_id']}'"
        return list(client.search_runs([client.get_experiment_by_name(run.parent.name).experiment_id], parent))

    send(0.0, 3)
    send(0.0, 3)
    (child,) = children()
    assert (child.info.run_name, child.info.status) == ("evaluate-run", "FINISHED")
    curve = client.get_metric_history(child.info.run_id, "frechet/heun/bnr_0.5")
    assert sorted((m.step, m.value) for m in curve) == [(9, 90.5), (35, 350.5)]
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["table.csv"]
    send(0.0, 5)
    send(1.0, 3)
    assert len(children()) == 3
    assert capsys.readouterr().out == ""
    send(0.0, 3, f"http://127.0.0.1:{free_port()}")
    assert "not logged: MLflow at" in capsys.readouterr().out
