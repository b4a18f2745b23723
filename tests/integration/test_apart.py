"""Ranks on machines that share no folder: refused without checkpoint.url, whole with it; see apart.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT
from tests.support.ranks import run_ranks
from tests.support.tiny_run import BATCH

WORKER = str(ROOT / "tests/support/apart.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("apart")
    for done in run_ranks(WORKER, str(root), size=2):
        assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Any]:
    return json.loads((root / "results.json").read_text())


def test_without_a_store_it_is_refused(results):
    assert "rank 1 does not see what rank 0 writes" in results["refused"]
    assert "checkpoint.url" in results["refused"]


def test_other_machines_go_on_from_the_store(results):
    first, second, whole = (results[key] for key in ("first", "second", "whole"))
    assert (first["shared"], second["shared"]) == (False, False)
    assert first["late"] == second["late"] == [[], []]
    assert (first["begin"], second["begin"]) == (0, BATCH * 12)
    assert first["losses"] + second["losses"] == whole["losses"]
    assert second["digest"] == whole["digest"]


def test_the_store_holds_what_is_kept_and_the_machines_nothing(root, results):
    assert results["names"] == [f"checkpoints/{BATCH * 20:012d}"]
    assert results["snapshots"] == [f"snapshots/{BATCH * n:012d}" for n in (8, 12, 16, 20)]
    for machine in ("machine0", "machine1", "other machine0", "other machine1"):
        left = sorted(path.parent.name for path in (root / machine).glob("checkpoints/*/*.safetensors"))
        assert set(left) <= {f"{BATCH * n:012d}" for n in (12, 20)}  # the last one stays, whoever sent it


def test_a_slow_rank_is_told_by_rank_0(results):
    assert len(results["slow"]) == 1
    assert results["slow"][0].startswith("rank 1 is slow: ")
    assert "ms more than the median rank; all others wait for it" in results["slow"][0]
