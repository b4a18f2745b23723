"""The figures of a run: where the time goes, who is slow."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_run import ALONE, BATCH, batches, config, info
from warm_dist.diffusion.heads import Loss
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World
from warm_dist.networks.flops import flops_per_image
from warm_dist.runs.metrics import RECORDS, MetricsLog, read_metrics
from warm_dist.training import step_metrics
from warm_dist.training.step_metrics import PHASES, StepMetrics, Stopwatch, eta
from warm_dist.training.trainer import Trainer


def test_stopwatch_gives_each_place_its_time(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    for place in ("data", "forward", "data", "", "forward"):
        watch.at(place)
    assert watch.read() == {"data": 2.0 + 4.0, "forward": 3.0}
    assert watch.read() == {}


@pytest.fixture
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    run = tmp_path_factory.mktemp("window")
    settings = config(
        run, engine="local", train__total_nimg=BATCH * 12, train__log_nimg=BATCH * 4, parallel__peak_flops=1e12
    )
    trainer = Trainer(settings, ALONE, info(), print)
    trainer.fit(batches(ALONE, 0), MetricsLog(run / "metrics.jsonl", 1), StopSignal(), None, set())
    return run, trainer


def test_a_line_says_where_the_time_went(trained):
    run, trainer = trained
    lines = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["nimg"] for r in lines] == [BATCH * 4, BATCH * 8, BATCH * 12]
    for line in lines:
        split = sum(line[f"{place}_s"] for place in PHASES)
        assert all(line[f"{place}_s"] >= 0 for place in PHASES)
        assert 0.5 * line["step_s"] < split <= line["step_s"] * 1.001
        assert line["images_per_s"] == pytest.approx(BATCH / line["step_s"])
        assert line["flops_per_s"] == pytest.approx(line["images_per_s"] * flops_per_image(trainer.config))
        assert line["mfu"] == pytest.approx(line["flops_per_s"] / 1e12)
        assert 5e7 < line["memory_bytes"] < 2e10
        assert line["skipped_steps"] == 0
        assert line["grad_norm"] > 0


def test_records_have_the_keys_of_their_types(trained):
    records = read_metrics(trained[0] / "metrics.jsonl")
    assert {record["kind"] for record in records} == {"train", "system"}
    for record in records:
        model = RECORDS[record["kind"]]
        loads = {key for key in record if key.endswith(("megabytes", "percentage", "watts"))}
        assert model.__annotations__.keys() - {"slowest_rank", "slowest_s"} == record.keys() - loads
        assert bool(loads) == (record["kind"] == "system")


def rows(*data_s: float) -> list[dict[str, float]]:
    return [{"data_s": s, "forward_s": 0.1, "step_s": 0.5} for s in data_s]


@pytest.mark.parametrize(
    ("ranks", "slow"),
    [
        (rows(0.0, 0.0, 0.2, 0.0), 2),
        (rows(0.2, 0.0), 0),
        (rows(0.01, 0.0, 0.02, 0.0), None),
        (rows(0.0, 0.0, 0.04, 0.0), None),
        (rows(0.2, 0.2, 0.2, 0.2), None),
    ],
)
def test_a_slow_rank_is_named(tmp_path, ranks, slow):
    said: list[str] = []
    measured = StepMetrics(config(tmp_path, engine="local"), ALONE, said.append)
    line = measured._slowest(ranks)
    assert [text.split(" is slow")[0] for text in said] == ([] if slow is None else [f"rank {slow}"])
    if slow is not None:
        assert line == {"slowest_rank": slow, "slowest_s": pytest.approx(0.2)}


def test_the_memory_told_of_is_that_of_the_rank_that_needs_most(tmp_path, monkeypatch):
    """Fault: the rank that needs least is told of, and the next one runs out of memory."""
    monkeypatch.setattr(
        step_metrics, "gather", lambda world, mine: [{**mine, "memory_bytes": size} for size in (2, 3, 1)]
    )
    line, _ = StepMetrics(config(tmp_path, engine="local"), ALONE, print).flush(BATCH, torch.ones(()))
    assert line["memory_bytes"] == 3


def test_figures_of_two_ranks_are_sums_or_means(tmp_path, monkeypatch):
    """64 images in 4 steps and 2 s, of which each rank had half; the other rank took 1.5 s a step."""
    world = World(0, 2, torch.device("cpu"), None)
    settings = config(tmp_path, engine="local", parallel__peak_flops=1e12)
    measured = StepMetrics(settings, world, print)
    monkeypatch.setattr(step_metrics.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(step_metrics, "gather", lambda world, mine: [mine, {**mine, "step_s": 1.5}])
    measured.add(Loss(*torch.tensor([[4.0, 2.0], [1.0, 2.0], [5.0, 6.0]]), None))
    measured.nimg, measured.num_steps, measured.seconds = 36, 4, 2.0
    line, _ = measured.flush(100, torch.ones(()))
    assert [line[name] for name in step_metrics.LOSSES] == [5.5, 3.0, 1.5]
    assert (line["images_per_s"], line["step_s"]) == (32.0, 1.0)
    assert line["flops_per_s"] == pytest.approx(16 * flops_per_image(settings))  # of a device
    assert line["mfu"] == pytest.approx(line["flops_per_s"] / 1e12)


def test_what_a_pause_takes_is_not_a_step_s(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 13.0, 100.0, 105.0])
    measured = StepMetrics(config(tmp_path, engine="local"), ALONE, print)
    monkeypatch.setattr(step_metrics.time, "monotonic", lambda: next(clock))
    for change in (measured.resume, measured.resume, measured.pause, measured.resume, measured.pause):
        change()
    assert measured.seconds == 3 + 5


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ([[1.0, 2, 3, 4, 5, 6], [10.0, 20, 30, 40, 50, 60]], [11, 22, 33, 44, 55, 66]),
        ([[1.0, 2, 3, 99, 4], [10.0, 20, 30, 990, 40]], [11, 22, 33, 44, 0, 0]),  # before `diagnosed` was counted
    ],
)
def test_sums_go_on_at_any_world_size(tmp_path, saved, expected):
    settings = config(tmp_path, engine="local")
    for size in (1, 2, 3):
        total = torch.zeros(len(step_metrics.SUMS), dtype=torch.float64)
        for rank in range(size):
            one = StepMetrics(settings, World(rank, size, torch.device("cpu"), None), print)
            one.load(saved)
            total += one.sums
        assert total.tolist() == expected


def test_means_are_over_the_images_that_were_finite_and_those_that_were_diagnosed(tmp_path):
    """Fault: a line's inconsistency is a mean over images for which nobody computed it; a micro-batch is lost."""
    measured = StepMetrics(config(tmp_path, engine="local"), ALONE, print)
    one, bad, last = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, math.inf, 7.0]), torch.tensor([6.0, 4.0])
    measured.add(Loss(2 * one, 3 * one, one, None))
    measured.add(Loss(2 * bad, 3 * bad, bad, 4 * bad))
    measured.add(Loss(2 * last, 3 * last, last, 4 * last))
    line, _ = measured.flush(BATCH, torch.ones(()))
    assert [line[name] for name in step_metrics.LOSSES] == [4.0, 8.0, 12.0]  # (6 + 12 + 10) / 7 images
    assert line["head_inconsistency"] == 22.0  # 4 (12 + 10) / 4 images
    assert not measured.sums.any()
    line, _ = measured.flush(BATCH, torch.ones(()))
    assert {line[name] for name in (*step_metrics.LOSSES, "head_inconsistency")} == {None}


def test_the_heads_are_compared_in_the_step_before_a_line(tmp_path):
    """Fault: a diagnosis in every step, or a line with that of another step than its last."""
    settings = config(tmp_path, engine="local", train__total_nimg=BATCH * 10, train__log_nimg=BATCH * 4)
    trainer, found = Trainer(settings, ALONE, info(), print), {}
    loss = trainer.loss

    def watched(*args: Any, **options: Any) -> Loss:
        result = loss(*args, **options)
        if result.inconsistency is not None:
            found[trainer.nimg + BATCH] = float(result.inconsistency.double().mean())
        return result

    trainer.loss = watched
    trainer.fit(batches(ALONE, 0), MetricsLog(tmp_path / "metrics.jsonl", 1), StopSignal(), None, set())
    lines = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
    assert [line["nimg"] // BATCH for line in lines] == [4, 8, 10]
    assert {line["nimg"]: line["head_inconsistency"] for line in lines} == pytest.approx(found)


def test_a_time_is_hours_minutes_and_seconds():
    assert [eta(seconds) for seconds in (59.9, 3725, 100 * 3600 + 61)] == ["0:00:59", "1:02:05", "100:01:01"]
