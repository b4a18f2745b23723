"""A finished run's model in MLflow: safetensors and code, no pickle, the same images as launch/sample.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.services import Services
from tests.support.mirrored_run import end, log, make_run
from tests.support.mlflow_runs import found
from tests.support.tiny_run import config, info
from warm_dist.checkpoints.format import CHECKPOINTS
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.checkpoints.weights import export_weights, load_weights
from warm_dist.config.load import dump
from warm_dist.distributed.world import World
from warm_dist.errors import UnreachableError
from warm_dist.evaluation.generate import generate, sample_labels
from warm_dist.networks.unet import build_network
from warm_dist.tracking.mirror import Mirror
from warm_dist.tracking.model import send_model

ALONE = World(0, 1, torch.device("cpu"), None)
LOADER = """
import json, sys
import mlflow.pyfunc, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
table = pd.DataFrame({"image": [5, 3], "label": [-1, -1]})
images = model.predict(table, params={"seed": 7, "nfe": 5})
try:
    model.predict(table, params={"nfe": 1})
except Exception as error:
    refusal = f"{type(error).__name__}: {error}"
import warm_dist
print(json.dumps([warm_dist.__file__, images.dtype.name, images.tolist(), refusal]))
"""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """As export_weights leaves them in a run's folder."""
    settings = config(tmp_path / "run")
    tree = dump(settings)  # of before, when it could hold credentials
    tree["data"]["endpoint_url"] = "https://key:hunter2@s3.example/?X-Amz-Signature=hunter2"
    path = tmp_path / "run" / "weights" / "ema.safetensors"
    tensors = {f"ema/{name}@0": value.flatten() for name, value in build_network(settings).state_dict().items()}
    storage = CheckpointManager(tmp_path / "run", ALONE, settings.checkpoint, print)
    meta = {"num_steps": 1, "config": tree, "data": info().to_json(), "fingerprint": "x"}
    storage.save(CHECKPOINTS, 1280, tensors, meta)
    export_weights([(storage.saved(1280), "ema", 1.0)], path)
    return path


def test_a_finished_runs_model_samples_its_images_anywhere(
    running: Services, client: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a model that needs this checkout's code, or a second send that makes another model or version."""
    run = make_run(tmp_path / "run", running.mlflow_url)
    log(run, [64, 1280])
    end(run, 0)

    def finish(register: str | None) -> None:
        mirror = Mirror(run, running.mlflow_url, run.parent.name)
        mirror.finish("FINISHED", {}, 1.0, list, lambda *given: send_model(*given, register=register) and None)

    broken = iter([OSError("the server went away")])

    def once_broken(*_: Any) -> None:
        for error in broken:
            raise error

    with monkeypatch.context() as patch:  # the model is announced, its files do not come
        patch.setattr("warm_dist.tracking.model.save_model", once_broken)
        with pytest.raises(UnreachableError, match="OSError: the server went away"):
            finish(None)
    finish(None)
    finish("warm")
    finish("warm")
    experiment = found(client, run).info.experiment_id
    (model,) = client.search_logged_models([experiment])
    assert (str(model.status), model.name) == ("READY", "ema")
    versions = client.search_model_versions("name = 'warm'")
    assert [version.source for version in versions] == [f"models:/{model.model_id}"], "one version"
    assert len(client.get_metric_history(found(client, run).info.run_id, "train/loss")) == 2
    assert found(client, run).info.status == "FINISHED"

    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.mlflow_url)
    folder = Path(mlflow.artifacts.download_artifacts("models:/warm/1", dst_path=str(tmp_path / "model")))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".py", ".j2", ".json", ".yaml", ".txt", ".safetensors", ""}
    assert not [path for path in files if path.read_bytes()[:2] == b"\x80\x04"], "a pickle by another name"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, str(folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    code, kind, images, refusal = json.loads(done.stdout.splitlines()[-1])
    assert Path(code).is_relative_to(folder), "warm_dist travels with the model"
    mine = load_weights(weights)
    sampler = mine.config.sampler.model_copy(update={"num_steps": 5})
    expected = generate(
        mine, [5, 3], sample_labels(7, [5, 3], 0), seed=7, device=next(mine.network.parameters()).device,
        batch_size=2, sampler=sampler,
    )  # fmt: skip
    assert kind == "uint8"
    assert refusal == "ConfigError: nfe 1: ancestral needs 2 or more"
    # another process may round differently, by one step of 255 and seldom
    apart = np.abs(np.array(images).transpose(0, 3, 1, 2).astype(int) - expected.astype(int))
    assert apart.max() <= 1
    assert (apart == 0).mean() >= 0.999


def test_a_run_that_has_not_finished_has_no_model(running: Services, weights: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", running.mlflow_url)
    log(run, [64])
    Mirror(run, running.mlflow_url, run.parent.name).finish("KILLED", {}, 1.0, list, pytest.fail)
