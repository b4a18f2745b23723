"""The report and the table of `bench.py gpu`, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import bench
from launch.benchmarks import gpu
from launch.benchmarks.contenders import ENGINES, PRECISIONS, Rounds
from launch.benchmarks.gpu import CONTENDERS, PEERS, report, row, settings, table
from launch.benchmarks.peers import network
from tests.support.commands import call
from tests.support.paths import ROOT
from tests.support.tiny_run import ALONE
from warm_dist.distributed import world
from warm_dist.errors import ConfigError, UnmeasuredError

CONFIG = str(ROOT / "configs" / "cifar10.json")
FACTS = {"first_s": 30.0, "state": 2 << 30, "cached": False, "wait_share": 0.25, "flops_per_image": 10**9}


def rounds_of(*seconds: float) -> list[dict[str, Any]]:
    return [{"seconds": one, "peak": int(4 * one * 2**30)} for one in seconds]


def test_every_engine_has_its_turn_and_the_telling_ones_come_first() -> None:
    """Fault: a way to train is forgotten, or listed twice."""
    ours = {f"{engine}-{precision}{how}" for engine in ENGINES for precision in PRECISIONS for how in ("", "-compiled")}
    assert ours < set(CONTENDERS)
    assert len(set(CONTENDERS)) == len(CONTENDERS)
    assert {*PEERS} == network.PEERS.keys()
    assert CONTENDERS[:2] == ("local-bf16-compiled", "zero1-bf16-compiled")


def test_figures_of_a_contender() -> None:
    """Fault: MFU of seconds instead of images/s, the least peak, or compiling that holds the steps after it."""
    found = row(rounds_of(2.0, 1.0, 4.0), FACTS, "local-bf16-compiled", 64, 1e12)
    assert found["images_per_s"] == {"median": 32, "min": 16, "max": 64}
    assert found["mfu"] == pytest.approx(1e9 * 32 / 1e12)
    assert (found["peak_gib"], found["state_gib"], found["wait_share"], found["rounds"]) == (16, 2, 0.25, 3)
    assert found["compile_s"] == 30 - 3 * 2
    assert found["cached"] is False
    eager = row(rounds_of(2.0), FACTS, "local-bf16", 64, None)
    assert [eager[key] for key in ("mfu", "compile_s", "cached")] == [None] * 3
    samples = row(rounds_of(2.0), FACTS, "sampling-bf16-compiled", 64, 1e12)
    assert samples["compile_s"] == 30 - 2
    bare = {"first_s": 1.0, "state": None, "cached": True, "wait_share": None}
    on_cpu = row([{"seconds": 2.0, "peak": None}], bare, "sampling-bf16", 64, None)
    assert [on_cpu[key] for key in ("mfu", "peak_gib", "state_gib", "wait_share")] == [None] * 4


def test_the_table_has_a_line_for_everybody(tmp_path: Path) -> None:
    """Fault: who failed or was not reached is left out, or fp32 is compared with the peak of bf16."""
    config = settings("zero1-bf16", CONFIG, 64, str(tmp_path), ["parallel.peak_flops=1e12"])
    rounds = Rounds(lambda name: None, 1, 1.0)  # type: ignore[arg-type,return-value]  # nobody is started
    rounds.rounds = {"local-bf16-compiled": rounds_of(2.0), "sampling-fp32": rounds_of(4.0)}
    rounds.facts = {"local-bf16-compiled": FACTS | {"cached": True}, "sampling-fp32": FACTS | {"flops_per_image": None}}
    rounds.failed, rounds.unreached = {"zero3-fp32": "no memory"}, ["zero0-fp32"]
    rounds.cut_off = ["zero2-fp32"]
    ends = {"budget_s": 9.0, "took_s": 4.0, "interrupted": False, "skipped": "peers are skipped: none"}
    found = report(rounds, config, torch.device("cpu")) | ends
    text = table(found)
    line = r"^local-bf16-compiled +32\.0 +32\.0\.\.32\.0 +0\.032 +8\.00 +0\.250 +24\.0 +1  compiled before$"
    assert re.search(line, text, re.M)
    assert re.search(r"^sampling-fp32 +16\.0 +16\.0\.\.16\.0 +16\.00 +0\.250 +1$", text, re.M)
    assert re.search(r"^zero3-fp32 +failed: no memory$", text, re.M)
    assert re.search(r"^zero0-fp32 +not reached in 9 s$", text, re.M)
    assert re.search(r"^zero2-fp32 +cut off in its first round$", text, re.M)
    cut = table(found | {"interrupted": True})
    assert re.search(r"^zero0-fp32 +not reached$", cut, re.M)
    assert cut.endswith("\ninterrupted after 4 s")
    assert text.endswith("\npeers are skipped: none")
    assert found["micro_batches"] == 1


def test_the_peak_is_that_of_the_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: fp32 is compared with the peak of bf16."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    rounds = Rounds(lambda name: None, 1, 1.0)  # type: ignore[arg-type,return-value]  # nobody is started
    rounds.rounds = {"zero1-bf16": rounds_of(1.0), "zero1-fp32": rounds_of(1.0)}
    rounds.facts = dict.fromkeys(rounds.rounds, FACTS)
    found = report(rounds, settings("zero1-bf16", CONFIG, 64, str(tmp_path), []), torch.device("cuda"))
    assert found["rows"]["zero1-bf16"]["mfu"] == pytest.approx(64e9 / 989.4e12)
    assert found["rows"]["zero1-fp32"]["mfu"] == pytest.approx(64e9 / 494.7e12)


def test_contenders_differ_in_what_their_names_say(tmp_path: Path) -> None:
    """Fault: a compiled contender is eager, or sampling in bf16 is in fp32."""
    compiled, eager, samples = (
        settings(name, CONFIG, 32, str(tmp_path), ["sampler.num_steps=9"])
        for name in ("zero2-bf16-compiled", "zero2-bf16", "sampling-bf16")
    )
    assert (compiled.parallel.compile, eager.parallel.compile) == (True, False)
    assert (eager.engine, eager.parallel.zero_stage) == ("deepspeed", 2)
    assert (samples.engine, samples.parallel.precision) == ("local", "bf16")
    assert (samples.sampler.method, samples.sampler.num_steps) == ("heun", 9)
    assert compiled.network == samples.network


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rounds", "0"], "at least 1"),
        *((["--budget", text], "--budget from 10 to 1000000 s") for text in ("nan", "inf", "0", "-1", "5", "1e200")),
        (["--device", "cuda"], "--device cpu measures on the processor"),
    ],
)
def test_what_it_refuses(words: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: without a GPU it measures the processor and does not say so, or ends in a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=told):
        call(bench.main, "gpu", *words)


class Fake:
    """A contender that is what its name says."""

    facts = FACTS

    def __init__(self, name: str, config: object, world: object) -> None:
        if name.startswith("zero3"):
            raise ValueError("no memory")
        if name.startswith("zero2"):
            raise KeyboardInterrupt

    def round(self) -> dict[str, Any]:
        return {"seconds": 1.0, "peak": None}

    def close(self) -> None: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(gpu, "Ours", Fake)
    monkeypatch.setattr(gpu, "release", lambda: None)
    monkeypatch.setattr(world, "join", lambda timeout_s: ALONE)
    monkeypatch.setattr(world, "shutdown", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    common = "gpu", "--device", "cpu", "--images", 2, "--json", "--peers-python", "none", "--contenders"
    return lambda *names: call(bench.main, *common, *names)


def test_what_is_done_is_told_where_nobody_sees_a_bar(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: in a log it is silent for minutes; a name given twice is measured twice; missing peers are told too late."""
    assert run("local-fp32", "zero3-bf16", "local-fp32", "diffusers-bf16") == 0
    out, err = capsys.readouterr()
    skipped = "peers are skipped: none does not exist; `make peers` makes it"
    assert err.splitlines() == [skipped, "1/2 local-fp32: measured", "2/2 zero3-bf16: failed: no memory"]
    found = json.loads(out)
    assert (found["rows"]["local-fp32"]["rounds"], found["interrupted"], found["skipped"]) == (5, False, skipped)


def test_ctrl_c_prints_what_was_measured(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: the rows so far are lost, or the command ends as if it had measured everything."""
    with pytest.raises(KeyboardInterrupt):
        run("local-fp32", "zero2-bf16", "zero1-bf16")
    found = json.loads(capsys.readouterr().out)
    assert ([*found["rows"]], found["cut_off"], found["unreached"]) == (["local-fp32"], ["zero2-bf16"], ["zero1-bf16"])
    assert found["interrupted"] is True


@pytest.mark.parametrize("name", ["zero3-bf16", "diffusers-bf16"])
def test_nothing_measured_is_no_success(run: Callable[..., int], capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Fault: a script takes a report without a row for a measurement."""
    with pytest.raises(UnmeasuredError, match="nothing was measured"):
        run(name)
    assert json.loads(capsys.readouterr().out)["rows"] == {}
