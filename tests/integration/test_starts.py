"""Commands that other tests call in their process or as forks, started once for real: a refusal is one line and its exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from warm_dist.errors import ConfigError, DataError, WarmDistError


@pytest.mark.parametrize(
    ("words", "kind", "told"),
    [
        (["launch/bench.py", "features", "--num-images", "3"], ConfigError, "--num-images must be at least 4"),
        (["launch/ema.py", "nowhere", "--length", "0.3"], ConfigError, "a relative width"),
        (["launch/export.py", "nowhere"], ConfigError, "is no folder"),
        (["launch/node.py", "--config", "nowhere"], ConfigError, "does not exist"),
        (["launch/report.py", "nowhere"], ConfigError, "not a run"),
        (["launch/spectrum.py", "nowhere/manifest.parquet"], DataError, "nowhere"),
        (["-m", "data_pipelines.index", "nowhere"], DataError, "has no .tar shards"),
        (["-m", "data_pipelines.info", "nowhere/manifest.parquet"], DataError, "nowhere"),
        (["-m", "data_pipelines.verify", "nowhere/manifest.parquet"], DataError, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refusal_is_one_line_and_a_code(words: list[str], kind: type[WarmDistError], told: str) -> None:
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (kind.exit_code, 1), done.stderr
    assert done.stderr.startswith(f"{kind.__name__}: ")
    assert told in done.stderr
