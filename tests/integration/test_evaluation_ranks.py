"""An evaluation over 1, 2 and 4 real processes: the same noise, images and distance at any world size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.processes import ROOT
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)
WORKER = str(ROOT / "tests/support/evaluation_worker.py")
SIZES = {1: ("8", "5", "50"), 2: ("8",), 4: ("8", "3")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def results(root: Path) -> dict[int, dict[str, Any]]:
    out = {}
    for size, batches in SIZES.items():
        for done in run_ranks(WORKER, str(root), str(size), *batches, size=size, timeout_s=300):
            assert done.returncode == 0, done.stderr[-3000:]
        out[size] = json.loads((root / f"{size}.json").read_text())
    return out


@pytest.fixture(scope="module")
def made(root: Path, results: dict[int, dict[str, Any]]) -> dict[tuple[int, str], Any]:
    return {(size, batch): np.load(root / f"{size}-{batch}.npz") for size, part in SIZES.items() for batch in part}


def test_noise_and_labels_are_bit_equal_at_any_world_and_batch_size(made: dict[tuple[int, str], Any]) -> None:
    first, *others = made.values()
    assert first["noise"].std() > 0.9
    assert len(set(first["labels"].tolist())) == 7
    for other in others:
        assert np.array_equal(other["noise"], first["noise"])
        assert np.array_equal(other["labels"], first["labels"])


def test_images_are_bit_equal_at_an_equal_micro_batch_and_near_at_another(made: dict[tuple[int, str], Any]) -> None:
    first = made[1, "8"]["images"].astype(int)
    for (size, batch), other in made.items():
        apart = np.abs(other["images"].astype(int) - first)
        print(f"{size} ranks, batch {batch}: {(apart > 0).mean():.1e} differ, by at most {apart.max()}")
        if batch == "8":
            assert not apart.any(), f"{size} ranks"
        else:
            assert apart.max() <= 1
            assert (apart == 0).mean() >= 0.999


def test_numbers_agree_over_world_sizes(results: dict[int, dict[str, Any]]) -> None:
    """Fault: moments that lack the images of one rank, or those of the last, partial batch."""
    first = results[1]["8"]
    assert {"frechet", "floor", "kid", "precision", "recall"} <= first.keys()
    for size in (2, 4):
        for name in first.keys() - {"seconds"}:
            assert results[size]["8"][name] == pytest.approx(first[name], rel=1e-10), name
    assert first["frechet"] > first["floor"] > 0


def test_what_ends_one_rank_ends_all(results: dict[int, dict[str, Any]]) -> None:
    for size, found in results.items():
        assert len(found["ends"]) == size
        assert all(told[0].startswith("Stopped: ") for told in found["ends"])  # by SIGTERM, or by a peer
        ((numerics, data, guide, output),) = {tuple(told[1:]) for told in found["ends"]}  # the same on all ranks
        assert numerics == f"NumericsError: a bad image on rank {size - 1}"
        assert data == f"DataError: a torn shard on rank {min(1, size - 1)}", "the lowest rank's"
        assert guide == f"CheckpointError: no guide on rank {size - 1}"
        assert output.startswith("OutputError: ")
