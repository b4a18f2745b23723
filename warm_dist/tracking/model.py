"""Logs a finished run's weights once as an MLflow model that samples images, and registers it on request."""

from __future__ import annotations

import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from warm_dist.tracking.client import patience

PACKAGE = Path(__file__).resolve().parents[1]  # warm_dist, stored with the model
NAME = "ema"
_NIMG_TAG = "warm_dist.nimg"
_REQUIREMENTS = ("torch", "numpy", "pydantic", "safetensors", "mlflow")  # imported for sampling


def send_model(client: Any, run_id: str, weights: Path, nimg: int, register: str | None = None) -> str:
    """Log `weights` (from `checkpoints.weights.export_weights`) as the run's model at nimg and return the model's id.

    register: name of the registered model that gets it as a version. A repeated call finds the existing model; an
    incomplete one is deleted and sent again. Call it inside `client.reaching`.
    """
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    ours = [model for model in found if model.tags.get(_NIMG_TAG) == str(nimg)]
    ready = [str(model.model_id) for model in ours if str(model.status) == "READY"]
    for model in ours:
        if model.model_id not in ready:
            client.delete_logged_model(model.model_id)
    model_id = ready[0] if ready else _log(client, experiment, run_id, weights, nimg)
    if register:
        _register(client, model_id, run_id, register)
    return model_id


def _log(client: Any, experiment: str, run_id: str, weights: Path, nimg: int) -> str:
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    tags = {_NIMG_TAG: str(nimg)}
    made = client.create_logged_model(experiment, name=NAME, source_run_id=run_id, tags=tags, model_type="diffusion")
    model = Model(artifact_path=made.artifact_location, model_uuid=made.model_id, run_id=run_id, model_id=made.model_id)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(path, weights, model)
        with patience(weights.stat().st_size):
            client.log_model_artifacts(made.model_id, str(path))
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step=nimg)])
    client.finalize_logged_model(made.model_id, "READY")
    return str(made.model_id)


def save_model(path: Path, weights: Path, model: Any = None) -> None:
    """Write the model's folder: MLmodel, weights and code, without pickles."""
    import mlflow.pyfunc
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    columns = Schema([ColSpec("long", "image"), ColSpec("long", "label")])
    params = [ParamSpec("seed", "long", 0), ParamSpec("nfe", "long", 0), ParamSpec("bnr", "double", -1.0)]
    params.append(ParamSpec("batch_size", "long", 64))
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, -1))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about MLflow's own use of pandas
        mlflow.pyfunc.save_model(
            str(path),
            mlflow_model=model,
            python_model=str(PACKAGE / "tracking" / "mlflow_model.py"),
            artifacts={"weights": str(weights)},
            code_paths=[str(PACKAGE)],
            signature=ModelSignature(columns, images, ParamSchema(params)),
            input_example=(pd.DataFrame({"image": [0], "label": [-1]}), {"seed": 0}),
            pip_requirements=[f"{name}=={version(name)}" for name in _REQUIREMENTS],
        )


def _register(client: Any, model_id: str, run_id: str, name: str) -> None:
    """Create a version of the registered model, unless this model already has one."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException:
        client.get_registered_model(name)  # raises the real cause if the name does not exist
    versions = client.search_model_versions(f"name = '{name}'")
    source = f"models:/{model_id}"
    if not any(version.source == source for version in versions):
        client.create_model_version(name, source, run_id=run_id, model_id=model_id)
