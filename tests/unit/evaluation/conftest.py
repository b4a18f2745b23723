"""A small evaluation on one process, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.evaluators import EVAL, REAL, Make
from tests.support.tiny_run import ALONE, config, info
from warm_dist.evaluation.evaluator import Evaluator
from warm_dist.store.open import open_store


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Make:
    def evaluator(
        read: Any = lambda rows: REAL[rows], stores: Any = open_store, run: str = "run", **changes: Any
    ) -> Evaluator:
        settings = config(
            tmp_path / run,
            eval={**EVAL, **changes},
            sampler={"method": "heun", "num_steps": 2},
            data__manifest=f"{tmp_path}/data/manifest.parquet",
        )
        monkeypatch.setattr("warm_dist.evaluation.evaluator.open_store", stores)
        return Evaluator(settings, ALONE, info(), read, tmp_path / run, said.append)

    return evaluator
