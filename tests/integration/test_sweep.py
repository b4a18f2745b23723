"""Sweeps for real: crashes, a killed driver, Ctrl-C, early stopping, S3. Each story is one sweep.

The first command of a story has a Ray of its own where that is part of it; all others join one.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT, wait_for
from tests.support.ray_head import ray_head
from tests.support.sweeps import EVERY, TOTAL, Command, evaluations, pack_digits, states, trial_named, write_sweep
from tests.support.zygote import zygote
from warm_dist import errors
from warm_dist.files import read_json
from warm_dist.store.open import open_store
from warm_dist.store.seaweedfs import S3Server

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pack_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ray(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which a sweep joins the Ray of this file, whose trials have S3's credentials."""
    with ray_head(tmp_path_factory.mktemp("ray"), s3.env) as env:
        yield env


def table(output: Path) -> list[dict[str, str]]:
    with (output / "results" / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_smoke_sweep(manifest, tmp_path):
    """configs/sweep_smoke.json as the docs print it, its folders apart: two BNRs, two seeds, ASHA, a surface.

    Fault: an example config that no longer runs, or an evaluation that the report leaves out.
    """
    import pyarrow.parquet as pq

    output = tmp_path / "smoke"
    sets = [f"output={output}", f"node_dir={tmp_path / 'node'}", f"data.manifest={manifest}"]
    config = ROOT / "configs" / "sweep_smoke.json"
    code, said = Command(config, *(word for text in sets for word in ("--set", text))).end()
    print(said)
    assert code == errors.EXIT_OK
    ended = states(output)
    assert len(ended) == 4
    assert "finished" in {end["state"] for end in ended.values()} <= {"finished", "stopped"}
    wanted = {
        "table.txt",
        "table.csv",
        "trials.parquet",
        "best.json",
        "bnr.png",
        "curves.png",
        "surface",
    }
    finished = {name for name, end in ended.items() if end["state"] == "finished"}
    if len({name.partition(",")[0] for name in finished}) < 2:
        wanted -= {"bnr.png"}  # one BNR alone is no curve
    assert {path.name for path in (output / "results").iterdir()} == wanted
    rows = pq.read_table(output / "results" / "trials.parquet").to_pylist()
    truth = [(run.name, nimg) for run in (output / "trials").iterdir() for nimg, _ in evaluations(run)]
    assert sorted((row["trial"], row["nimg"]) for row in rows) == sorted(truth)


def test_crashes(manifest, ray, tmp_path):
    """One trial is killed once, one is killed whenever it begins, one leaves the finite numbers.

    Fault: a crash that ends the whole sweep, a retry from scratch, or a retry of an error that must recur.
    """
    space = {"train.lr": {"grid": [0.002, 0.003, 1e15]}}
    output = tmp_path / "sweep"
    config = write_sweep(tmp_path, manifest, space, trial={"max_failures": 1}, set={"train.clip": None})
    sweep = Command(config, env=ray)
    once, always = (f"lr={lr},seed=0" for lr in (0.002, 0.003))
    killed = {once: 0, always: 0}
    seen: set[int] = set()

    def meddle() -> bool:
        for start in killed:
            for run in (output / "trials").glob(f"{start}-*"):
                pids = sweep.training(run.name)
                due = evaluations(run) if start == once and not killed[once] else pids if start == always else []
                if due and pids and not seen & set(pids):
                    seen.update(pids)
                    killed[start] += sweep.kill(run.name)
        return sweep.process.poll() is not None

    wait_for("the sweep's end", meddle)
    code, said = sweep.end()
    print(said)
    assert code == errors.EXIT_OK
    assert killed == {once: 1, always: 2}
    ended = states(output)
    assert {name: (end["state"], end["nimg"]) for name, end in ended.items()} == {
        once: ("finished", TOTAL),
        always: ("failed", 0),
        "lr=1e+15,seed=0": ("failed", 0),
    }
    assert "ended with code 137" in ended[always]["reason"]  # 128 + SIGKILL
    assert ended["lr=1e+15,seed=0"]["reason"].startswith("NumericsError")
    resumed = evaluations(trial_named(output, once))
    assert [nimg for nimg, _ in resumed] == list(range(EVERY, TOTAL + 1, EVERY))
    assert resumed[0][1] == 1  # before the kill
    assert resumed[-1][1] == 2
    assert read_json(trial_named(output, "lr=1e+15") / "run.json")["attempt"] == 1  # it would only fail again
    told = re.findall(rf"{once}-\w+  nimg ([\d,]+)  Fréchet", said)
    assert told == [f"{nimg:,}" for nimg in range(EVERY, TOTAL + 1, EVERY)]  # rising, each once
    assert said.count("crashed (ended with code 137") == 2
    assert "Traceback" not in said
    assert [row["state"] for row in table(output)] == ["finished", "failed", "failed"]


def test_a_driver_that_is_killed_or_stopped_is_gone_on_with(manifest, ray, tmp_path):
    """kill -9 when one trial has finished; then Ctrl-C; then to the end. What was finished is not touched again.

    Killed, the command takes its own Ray with it; later it joins one.
    """
    config = write_sweep(tmp_path, manifest, {"process.bnr": {"grid": [0, 0.5, 1]}})
    output = tmp_path / "sweep"
    sweep = Command(config)
    trials = output / "trials"
    wait_for(
        "a finished trial and one under way",
        lambda: (
            len(list(trials.glob("*/ended.json"))) >= 1
            and any(
                sweep.training(run.name) and evaluations(run)
                for run in trials.iterdir()
                if not (run / "ended.json").exists()
            )
        ),
    )
    finished = {path.parent.name for path in trials.glob("*/ended.json")}
    sweep.process.kill()
    empty_s = wait_for("nobody left", lambda: not sweep.alive(), 60)
    print(f"nothing of the killed sweep was left after {empty_s:.1f} s")
    sweep.end()
    kept = {name: (trials / name / "weights" / "ema.safetensors").stat().st_mtime_ns for name in finished}

    code, said = Command(config).end()
    assert (code, "holds a sweep already; --resume goes on" in said) == (errors.ConfigError.exit_code, True)
    code, said = Command(config, "--resume", "--set", "train.lr=0.5").end()
    assert (code, "holds a sweep of other trials" in said) == (errors.ConfigError.exit_code, True)

    sweep = Command(config, "--resume", env=ray)
    wait_for("a trial that goes on", lambda: any(sweep.training(run.name) for run in trials.iterdir()))
    sweep.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    code, said = sweep.end()
    print(said, f"ended {time.monotonic() - began:.1f} s after Ctrl-C")
    assert (code, "Traceback" in said) == (errors.Stopped.exit_code, False)
    assert "trials not ended; the same command with --resume continues" in said
    assert (output / "results" / "table.csv").exists()

    code, said = Command(config, "--resume", env=ray).end()
    print(said)
    assert code == errors.EXIT_OK
    assert {end["state"] for end in states(output).values()} == {"finished"}
    for name in finished:
        assert (trials / name / "weights" / "ema.safetensors").stat().st_mtime_ns == kept[name]
        assert read_json(trials / name / "run.json")["attempt"] == 1
    assert len(table(output)) == 3
    code, said = Command(config, "--resume").end()
    assert (code, "ray:" in said) == (errors.EXIT_OK, False)  # nothing left to do: only the report


def test_early_stopping_and_what_it_leaves(manifest, ray, tmp_path):
    """The slower one is stopped; a value more joins the sweep that has ended, and is judged by the others' results.

    Fault: ASHA resumed without the results of the trials that have ended.
    """
    asha = {"kind": "asha", "grace_nimg": EVERY, "reduction_factor": 2}
    space = {"train.lr": {"grid": [1e-3, 1e-5]}}
    config = write_sweep(tmp_path, manifest, space, scheduler=asha, max_concurrent=1)
    output = tmp_path / "sweep"
    code, said = Command(config, env=ray).end()
    print(said)
    assert code == errors.EXIT_OK
    assert {name: end["state"] for name, end in states(output).items()} == {
        "lr=0.001,seed=0": "finished",
        "lr=1e-05,seed=0": "stopped",
    }
    stopped = trial_named(output, "lr=1e-05,seed=0")
    assert read_json(stopped / "exit.json")["code"] == errors.Stopped.exit_code
    best = json.loads((output / "results" / "best.json").read_text())
    assert best["train"]["lr"] == 1e-3
    best_config = output / "results" / "best.json"
    assert zygote().run(ROOT / "launch" / "train.py", "--config", best_config, "--dry-run").returncode == 0
    space["train.lr"]["grid"].append(1e-12)
    code, said = Command(config, "--resume", "--set", f"space={json.dumps(space)}", env=ray).end()
    print(said)
    assert code == errors.EXIT_OK
    late = trial_named(output, "lr=1e-12,seed=0")  # alone with its own result it would have gone on to its end
    assert (read_json(late / "ended.json")["state"], len(evaluations(late))) == ("stopped", 1)
    assert len(table(output)) == 3


def test_a_sweep_on_s3_needs_nothing_of_the_machine(tmp_path, manifest, ray, s3):
    """Output on S3; the driver is killed and the machine's folder lost; the sweep goes on from what lies on S3."""
    url = f"s3://{s3.bucket}/{tmp_path.name}/sweep"
    config = write_sweep(
        tmp_path, manifest, {"process.bnr": {"grid": [0.5, 1]}}, output=url, endpoint_url=s3.endpoint_url,
        max_concurrent=1, surface={"nfe": [3, 4], "num_images": 64},
    )  # fmt: skip
    store = open_store(url, s3.endpoint_url)
    sweep = Command(config, env=ray)
    ended = lambda: [path for path in store.list("trials/") if path.endswith("/ended.json")]  # noqa: E731
    saved = lambda: {path.split("/")[1] for path in store.list("trials/") if path.endswith("/COMPLETE")}  # noqa: E731
    wait_for(
        "one at its end, one with a checkpoint on S3",
        lambda: (len(ended()) == 1 and len(saved()) == 2) or sweep.process.poll() is not None,
    )
    assert len(ended()) == 1, sweep.end()[1]
    sweep.process.kill()
    wait_for("nobody left", lambda: not sweep.alive() and not sweep.training(), 60)
    sweep.end()
    shutil.rmtree(tmp_path / "node")
    code, said = Command(config, "--resume", env=ray).end()
    print(said)
    assert code == errors.EXIT_OK
    assert len(ended()) == 2
    wanted = {"table.txt", "table.csv", "trials.parquet", "best.json", "bnr.png", "curves.png"}
    assert {f"results/{name}" for name in wanted | {"surface/table.csv"}} <= set(store.list())
    left = list((tmp_path / "node").rglob("checkpoints"))
    assert left == []  # a trial that has ended leaves nothing on its machine
