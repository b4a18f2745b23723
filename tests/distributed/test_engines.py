"""One set of processes per world size serves all cases; see worker.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_ranks

pytestmark = pytest.mark.slow
WORKER = str(Path(__file__).with_name("worker.py"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    root = tmp_path_factory.mktemp("engines")
    out = {}
    for size, saved_by in ((2, 0), (1, 2)):
        for done in run_ranks([WORKER, str(root), str(saved_by)], size):
            assert done.returncode == 0, done.stderr[-3000:]
            assert "Warning" not in done.stderr, done.stderr
        out[size] = json.loads((root / f"results-{size}.json").read_text())
    return out


def apart(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


SHARDED = ("zero1", "zero2", "zero3")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", ["zero0", "zero1", "zero2", "zero3", "local"])
def test_losses_equal_local_engine_on_one_process(results, size, case):
    reference = results[1]["engines"]["local"]["losses"]
    assert apart(results[size]["engines"][case]["losses"], reference) < 5e-6  # float32 sums in another order


@pytest.mark.parametrize("case", ["zero1-accumulate", "zero2-accumulate"])
def test_accumulation_changes_no_loss(results, case):
    assert apart(results[2]["engines"][case]["losses"], results[1]["engines"]["local"]["losses"]) < 5e-6


@pytest.mark.parametrize("case", ["zero0-bf16", "zero1-bf16"])
def test_bf16_losses_are_near(results, case):
    reference = results[1]["engines"]["local"]["losses"]
    assert 0 < apart(results[2]["engines"][case]["losses"], reference) < 2e-2  # 8 bits of mantissa, and 20 steps


@pytest.mark.parametrize("size", [1, 2])
def test_fragments_hold_every_element_once_and_sharded_stages_a_share(results, size):
    whole = results[1]["engines"]["local"]["elements"]
    for case, found in results[size]["engines"].items():
        assert found["elements"] == whole
        assert found["held"] == pytest.approx(whole / size if case.startswith(SHARDED) else whole, rel=0.02)


def test_world_sizes_and_stages_reach_the_same_state(results):
    # Adam divides by sqrt(v): rounding of the gradients shows at 1e-4 of the moments' size
    reference = results[1]["engines"]["local"]["digest"]
    for size in (1, 2):
        for case in ("zero0", *SHARDED):
            assert results[size]["engines"][case]["digest"] == pytest.approx(reference, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_an_interrupted_run_equals_an_unbroken_one_to_the_last_bit(results, stage):
    found = results[2]["interrupted"][stage]
    assert found["stopped_at"] == 8 * 8  # asked for after step 7, adopted by all ranks one step later
    assert found["losses"] == found["expected"]
    assert found["digests"][0] == found["digests"][1]


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_two_ranks_at_stage_1_are_resumed_by_one_at_any_stage(results, stage):
    rest = results[1]["elastic"][stage]
    assert apart(rest, results[2]["engines"]["zero1"]["losses"][-len(rest) :]) < 5e-6
    assert len(rest) == 10


@pytest.mark.parametrize("case", ["local", "zero0", "zero1", "zero2", "zero3"])
def test_a_non_finite_loss_ends_every_rank_and_moves_no_weight(results, case):
    found = results[2]["non_finite"][case]
    assert "rank 1 nimg 24 sample image28 at sigma" in found["message"]
    assert found["moved"] == 0.0


def test_collectives_agree(results):
    agreed = {"on_main": "from 0", "caught": ["rank 0 says no"] * 2, "any": True, "none": False}
    assert results[2]["collectives"] == agreed


def test_sharded_ema_is_the_plain_ema(results):
    assert results[2]["ema"] < 1e-6
