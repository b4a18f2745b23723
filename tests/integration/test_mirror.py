"""The MLflow mirror against a real server: every value exactly once, whatever is killed, doubled or replaced."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.services import Services
from tests.support.mirrored_run import STEPS, end, log, make_run
from tests.support.mlflow_runs import catch_up, found, history
from tests.support.processes import wait_for
from warm_dist import supervisor
from warm_dist.figures import save_grid
from warm_dist.files import read_json, write_json
from warm_dist.records import write_record
from warm_dist.runs.metrics import MetricsLog
from warm_dist.tracking.follow import start_mirror
from warm_dist.tracking.mirror import Mirror


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder at its first attempt, nothing logged yet; its MLflow experiment has the test's name."""
    return make_run(tmp_path / "run", "http://user:hunter2@127.0.0.1:1/?token=hunter2")


def test_a_finished_run_is_shown_whole_and_once(running: Services, client: Any, run: Path, tmp_path: Path) -> None:
    log(run, STEPS[:30])  # the first attempt was killed after its save at STEPS[19] …
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "nimg": 9')
    log(run, STEPS[20:], attempt=2, scale=2.0)  # … and the second logged ten steps again
    MetricsLog(run / "metrics.jsonl", 2).write(STEPS[-1], "eval", frechet=70.5, floor=14.4, spec="abc123def456")
    make_run(run, "http://127.0.0.1:1", attempt=2, lr_ramp_nimg=64)
    write_json(run / "config.json", read_json(run / "config.json") | {"process": {"bnr": 0.1}})
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    save_grid(images, run / "samples" / "000000001280.png", columns=2)
    write_json(run / "exit.json", {"code": 0, "reason": "https://key:hunter2@s3/x was read", "attempt": 2})

    done = catch_up(run, running.mlflow_url, AWS_SECRET_ACCESS_KEY="hunter2")
    skipped = f"{run}/metrics.jsonl: 1 line cannot be read; skipped\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", skipped)
    shown = found(client, run)
    expected = [(n, 1 / n) for n in STEPS[:20]] + [(n, 2 / n) for n in STEPS[20:]]
    assert history(client, run) == expected, "the highest attempt's value of each nimg, once"
    assert history(client, run, "eval/frechet") == [(STEPS[-1], 70.5)]
    assert set(shown.data.metrics) == {"train/loss", "train/loss_blurry", "eval/frechet", "eval/floor"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "kind" in line]
    stamps = {m.step: m.timestamp for m in client.get_metric_history(shown.info.run_id, "train/loss")}
    assert stamps == {r["nimg"]: int(r["time"] * 1000) for r in lines if r["kind"] == "train"}, "the lines' own times"
    assert shown.info.status == "FINISHED"
    assert shown.info.run_name == "trial"
    assert shown.data.params["train.lr"] == "0.001"
    assert shown.data.params["log10_bnr"] == "-1.0000"
    wanted = {"commit": "c0ffee", "world_size": "2", "attempt": "2", "eval.spec": "abc123def456"}
    assert wanted.items() <= shown.data.tags.items()

    received = {}
    for name in ("curves.png", "config.json"):
        url = f"{running.mlflow_url}/get-artifact?run_uuid={shown.info.run_id}&path={name}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            received[name] = reply.read()
    assert json.loads(received.pop("config.json"))["data"]["endpoint_url"] == "https://s3.example/x"
    assert received == {name: (run / name).read_bytes() for name in received}

    large, small = sorted(file.path for file in client.list_artifacts(shown.info.run_id, "images"))
    assert re.fullmatch(r"images/samples\+step\+1280\+timestamp\+\d+\+[-0-9a-f]+(\+compressed\.webp|\.png)", large)
    picture = Path(
        client.download_artifacts(shown.info.run_id, large if large.endswith("png") else small, str(tmp_path))
    )
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(Image.open(run / "samples" / "000000001280.png")))

    assert shown.data.tags["exit.reason"] == "https://s3/x was read"
    root = running.s3.directory.parent
    kept = b"".join(file.read_bytes() for file in root.glob("mlflow.*"))
    assert b"hunter2" not in kept, "whoever's secret it is"
    assert running.s3.env["AWS_SECRET_ACCESS_KEY"].encode() not in kept

    (run / "mirror.json").unlink()
    assert catch_up(run, running.mlflow_url).returncode == 0
    assert found(client, run).info.run_id == shown.info.run_id, "found again without its mirror.json"
    assert history(client, run) == expected
    assert len(client.list_artifacts(shown.info.run_id, "images")) == 2, "and no picture twice"


def test_killed_in_the_middle_and_started_again(running: Services, client: Any, run: Path) -> None:
    """Fault: a second MLflow run once mirror.json is lost, or a mirror that ends at the ranks' SIGTERM."""
    make_run(run, running.mlflow_url)
    log(run, STEPS[:20])
    first = start_mirror(run)
    wait_for("the mirror", lambda: (read_json(run / "mirror.json") or {}).get("offset"))
    first.kill()
    first.wait()
    log(run, STEPS[20:])
    (run / "mirror.json").write_text('{"run_id": "", "offset": 0}')  # and its memory is gone, too
    second = start_mirror(run)
    wait_for("the mirror", lambda: (read_json(run / "mirror.json") or {}).get("offset"))
    second.terminate()  # deepspeed's launcher signals everything that its ranks have started
    assert found(client, run).info.status == "RUNNING"
    log(run, [9999])
    end(run, 75)
    assert second.wait(60) == 0
    assert history(client, run) == [(n, 1 / n) for n in [*STEPS, 9999]]
    assert found(client, run).info.status == "KILLED"
    assert (run / "mirror.log").read_text() == ""


def test_the_end_of_the_owner_ends_the_mirror(running: Services, client: Any, run: Path) -> None:
    make_run(run, running.mlflow_url)
    log(run, STEPS)
    code = f"from pathlib import Path; from warm_dist.tracking.follow import start_mirror; print(start_mirror(Path({str(run)!r})).pid)"
    owner = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert owner.returncode == 0, owner.stderr
    mirror = supervisor.identity(int(owner.stdout))
    wait_for("the mirror", lambda: not supervisor.alive(mirror))
    assert history(client, run) == [(n, 1 / n) for n in STEPS]
    assert found(client, run).info.status == "KILLED"


def test_a_second_attempt_goes_on_in_the_same_run(running: Services, client: Any, run: Path) -> None:
    log(run, STEPS[:20])
    end(run, 75)
    assert catch_up(run, running.mlflow_url).returncode == 0
    assert found(client, run).info.status == "KILLED"
    (run / "exit.json").unlink()
    make_run(run, running.mlflow_url, attempt=2, lr=5e-4, clip=1.0)
    log(run, STEPS[10:], attempt=2, scale=2.0)
    mirror = Mirror(run, running.mlflow_url, run.parent.name)
    mirror.sync(running=True)
    shown = found(client, run)
    assert shown.info.status == "RUNNING"
    assert history(client, run) == [(n, 1 / n) for n in STEPS[:20]] + [(n, 2 / n) for n in STEPS[20:]]
    assert (shown.data.params["train.lr"], shown.data.tags["changed.train.lr"]) == ("0.001", "0.0005")
    assert shown.data.params["train.clip"] == "1.0"

    (run / "metrics.jsonl").unlink()  # the folder is emptied and used for another run
    log(run, [32], scale=3.0)
    assert Mirror(run, running.mlflow_url, run.parent.name).sync(running=True) == 2
    assert len(client.search_runs([shown.info.experiment_id])) == 2


def test_a_run_that_was_made_twice_is_one_again(running: Services, client: Any, run: Path) -> None:
    log(run, STEPS[:10])
    mirror = Mirror(run, running.mlflow_url, run.parent.name)
    mirror.sync(running=True)
    kept = found(client, run)
    tags = {key: kept.data.tags[key] for key in ("warm_dist.run",)}
    client.create_run(kept.info.experiment_id, start_time=1, tags=tags)  # asked for first, answered after we gave up
    again = Mirror(run, running.mlflow_url, run.parent.name)
    again.sync(running=True)
    assert found(client, run).info.run_id == kept.info.run_id, "the one that mirror.json knows"
    assert len(history(client, run)) == 10


def test_a_part_that_may_have_arrived_is_sent_again_as_it_was(running: Services, client: Any, run: Path) -> None:
    """Killed between sending and noting it down; then a new attempt logs the same steps with other values."""
    log(run, STEPS[:10])
    Mirror(run, running.mlflow_url, run.parent.name).sync(running=True)
    before = read_json(run / "mirror.json")
    log(run, STEPS[10:20])
    Mirror(run, running.mlflow_url, run.parent.name).sync(running=True)
    del before["sha256"]
    write_record(run / "mirror.json", {**before, "sending": read_json(run / "mirror.json")["offset"]})
    log(run, STEPS[10:30], attempt=2, scale=2.0)
    mirror = Mirror(run, running.mlflow_url, run.parent.name)
    assert mirror.sync(running=True) == 20 + 20
    assert history(client, run) == [(n, 1 / n) for n in STEPS[:20]] + [(n, 2 / n) for n in STEPS[20:30]]
    assert read_json(run / "mirror.json")["sending"] is None


def test_runs_that_end_before_their_first_metric_are_runs_of_their_own(
    running: Services, client: Any, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        run = make_run(tmp_path / name, running.mlflow_url)
        end(run, 2)
        Mirror(run, running.mlflow_url, tmp_path.name).finish("FAILED", {}, 1e9)  # nothing to show yet
        assert client.get_experiment_by_name(tmp_path.name) is None or name == "b"
        MetricsLog(run / "metrics.jsonl", 1).begin()
        MetricsLog(run / "metrics.jsonl", 2).begin()  # once
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
        assert catch_up(run, running.mlflow_url).returncode == 0
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert [found.info.status for found in client.search_runs([experiment.experiment_id])] == ["FAILED", "FAILED"]


def test_another_metrics_file_of_the_same_run_is_sent_whole(running: Services, client: Any, run: Path) -> None:
    """Shorter, as from a backup: what the server holds stays, and what comes after is not cut."""
    log(run, STEPS[:30])
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    mirror = Mirror(run, running.mlflow_url, run.parent.name)
    mirror.sync(running=True)
    (run / "metrics.jsonl").write_text("".join(whole[:10]))
    log(run, STEPS[10:15], attempt=2, scale=2.0)
    log(run, STEPS[30:35], attempt=2, scale=2.0)
    assert mirror.sync(running=True) == 10
    assert history(client, run) == [(n, 1 / n) for n in STEPS[:30]] + [(n, 2 / n) for n in STEPS[30:35]]
