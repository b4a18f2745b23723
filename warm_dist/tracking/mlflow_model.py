"""The MLflow model of a finished run: samples images from its EMA weights.

Logged as "models from code": MLflow copies this file and warm_dist beside the safetensors; nothing is pickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

DEFAULTS = {"seed": 0, "nfe": 0, "bnr": -1.0, "batch_size": 64}
"""Parameters of `predict`; nfe 0 and a negative bnr select the config's values."""


class ImageSampler(PythonModel):  # type: ignore[misc]  # mlflow has no types for mypy
    """Samples images: `mlflow.pyfunc.load_model(uri).predict(table, params={"seed": 0, "nfe": 35})`."""

    def load_context(self, context: Any) -> None:
        """Load the weights; MLflow calls this once."""
        import torch

        from warm_dist.checkpoints.weights import load_weights

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_weights(Path(context.artifacts["weights"]), self.device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Images (N, H, W, C) uint8, one for each row of the table, equal to those of launch/sample.py.

        model_input: columns `image` (index in the seed's sequence) and `label` (class; -1: drawn at random).
        params: see DEFAULTS. Raises ConfigError for an NFE, a BNR or a label that this network does not support.
        """
        import numpy as np

        from warm_dist.checkpoints.weights import load_guide
        from warm_dist.errors import ConfigError
        from warm_dist.evaluation.generate import draw_labels, generate
        from warm_dist.evaluation.sampler_choice import sampler_for

        asked = {**DEFAULTS, **(params or {})}
        config, nfe, bnr = self.model.config, int(asked["nfe"]), float(asked["bnr"])
        sampler = sampler_for(config, [], nfe=nfe or None, bnr=bnr if bnr >= 0 else None)
        indices, labels = (np.asarray(model_input[name], np.int64) for name in ("image", "label"))
        drawn = draw_labels(self.model, sampler, int(asked["seed"]), indices.tolist())
        if (labels >= max(config.data.num_classes, 0)).any():
            raise ConfigError(f"label {labels.max()}: this network has {config.data.num_classes} classes")
        options: dict[str, Any] = {name: int(asked[name]) for name in ("seed", "batch_size")} | {"device": self.device}
        guide, labels = load_guide(sampler, self.model.info, self.device), np.where(labels < 0, drawn, labels)
        images = generate(self.model, indices.tolist(), labels, **options, sampler=sampler, guide=guide)
        return images.transpose(0, 2, 3, 1)


set_model(ImageSampler())
