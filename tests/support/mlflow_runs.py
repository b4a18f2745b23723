"""What MLflow shows of a run's folder, and the command that sends it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.zygote import zygote


def catch_up(path: Path, url: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`launch/mirror.py RUN --url URL` to its end."""
    words = (ROOT / "launch" / "mirror.py", path, "--url", url)
    return zygote().run(*words, env={**os.environ, **env})


def found(client: Any, path: Path) -> Any:
    """The one MLflow run of the folder, found by its experiment: a second one would be a duplicate."""
    experiment = client.get_experiment_by_name(path.parent.name)
    (only,) = client.search_runs([experiment.experiment_id])
    return only


def history(client: Any, path: Path, key: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(found(client, path).info.run_id, key))
