"""Non-finite steps: left out, counted, told with their samples, and the end after so many in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_run import ALONE, BATCH, batches, config, info
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.distributed.stop import StopSignal
from warm_dist.errors import NumericsError
from warm_dist.runs.metrics import RECORDS, MetricsLog, read_metrics
from warm_dist.training.nonfinite import NonFiniteGuard, Trace
from warm_dist.training.trainer import Trainer


def train(run: Path, poisoned: set[int], said: list[str], **changes: Any) -> tuple[Trainer, list[list[float]]]:
    """20 steps; the steps numbered in `poisoned` see a NaN. Returns the first parameter after every step too."""
    settings = config(run, engine="local", train__total_nimg=BATCH * 20, train__save_nimg=BATCH * 20, **changes)
    storage = CheckpointManager(run, ALONE, settings.checkpoint, said.append)
    trainer = Trainer(settings, ALONE, info(), said.append, storage)
    step, after = trainer.step, []

    def deadly(data: Any) -> Any:
        if trainer.nimg // BATCH in poisoned:
            data.x0[3] = float("nan")
        trace = step(data)
        after.append(trainer.engine.shard()[0].master[:4].tolist())
        return trace

    trainer.step = deadly  # type: ignore[method-assign]
    trainer.fit(batches(ALONE, 0), MetricsLog(run / "metrics.jsonl", 1), StopSignal(), None, set())
    return trainer, after


def test_a_step_is_left_out_reported_and_counted(tmp_path):
    said: list[str] = []
    trainer, after = train(tmp_path, {7, 8, 12}, said, train__max_nonfinite=3)
    for number in (7, 8, 12):
        assert after[number] == after[number - 1]
    assert after[9] != after[8]
    told = [text for text in said if "update left out" in text]
    assert [text.split("(")[1].split(" in a row")[0] for text in told] == ["1 of 3", "2 of 3", "1 of 3"]
    assert f"nimg {BATCH * 7} sample image{BATCH * 7 + 3} at sigma" in told[0]
    assert trainer.guard.skipped == 3
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["nimg"] // BATCH for r in records if r["kind"] == "event"] == [7, 8, 12]
    assert all(
        r.keys() == RECORDS[r["kind"]].__annotations__.keys() for r in records if r["kind"] in ("event", "checkpoint")
    )
    lines = [r for r in records if r["kind"] == "train"]
    assert all(r["loss"] == r["loss"] and r["loss"] is not None for r in lines)  # the finite images' mean
    assert lines[7]["grad_norm"] is None
    assert lines[-1]["skipped_steps"] == 3
    assert trainer.checkpoints.saved(BATCH * 20).meta["num_steps"] == 17
    assert {float(state["step"]) for state in trainer.engine.optimizer.state.values()} == {17.0}


def test_so_many_in_a_row_end_the_run(tmp_path):
    said: list[str] = []
    with pytest.raises(NumericsError, match=rf"in 3 steps in a row, at last: rank 0 nimg {BATCH * 9} sample"):
        train(tmp_path, {7, 8, 9}, said, train__max_nonfinite=3)
    assert not (tmp_path / "checkpoints").exists()


def test_by_default_the_first_ends_the_run(tmp_path):
    with pytest.raises(NumericsError, match=f"non-finite: rank 0 nimg {BATCH * 7} sample image{BATCH * 7 + 3}"):
        train(tmp_path, {7}, [])


def test_one_in_the_last_step_is_noticed_before_the_last_save(tmp_path):
    with pytest.raises(NumericsError, match=f"nimg {BATCH * 19} sample"):
        train(tmp_path, {19}, [])
    assert not (tmp_path / "checkpoints").exists()


def test_a_stop_that_is_under_way_is_told_before_a_save():
    """Fault: a stop that was asked for in the step before a save is lost, and the run trains on until it is killed."""
    guard = NonFiniteGuard(ALONE, 1, lambda nimg, text: None)
    assert not guard.check(True, Trace(0, (), torch.zeros(0), []), torch.zeros(1, dtype=torch.bool))
    assert guard.settle()
    assert not guard.settle(), "told once"


def test_a_sample_is_told_with_its_own_sigma():
    guard = NonFiniteGuard(ALONE, 1, lambda nimg, text: None)
    losses = [torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan, 1.0])]
    trace = Trace(32, ("a", "b", "c", "d"), torch.tensor([0.1, 0.2, 0.3, 0.4]), losses)
    words = "rank 0 nimg 32 sample"
    assert guard._samples(trace) == [f"{words} b at sigma 0.2", f"{words} c at sigma 0.3"]


@pytest.mark.parametrize(
    ("loss", "norm", "bad"), [(1.0, 1.0, False), (torch.inf, 1.0, True), (1.0, torch.inf, True), (torch.nan, 1.0, True)]
)
def test_a_step_needs_a_finite_loss_and_a_finite_gradient(tmp_path, loss, norm, bad):
    trainer = Trainer(config(tmp_path, engine="local"), ALONE, info(), print)
    trainer.grad_norm = torch.tensor(norm)
    found = trainer._non_finite(Trace(0, (), torch.zeros(0), [torch.ones(2), torch.tensor([1.0, loss])]))
    assert found.tolist() == [bad]
