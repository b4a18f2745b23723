"""The quickstart as a user runs it, in small: interrupted, gone on, finished, and its pictures seen through `make ui`."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.processes import ROOT, free_port
from warm_dist.errors import Stopped
from warm_dist.runs.metrics import read_metrics

pytestmark = pytest.mark.timeout(400)
SMALL = {
    "network.channels": 8,
    "network.channel_mult": [1, 2],
    "train.total_nimg": 1600,
    "train.lr_decay_nimg": 0,
    "train.log_nimg": 160,
    "train.save_nimg": 800,
    "eval.eval_nimg": 1600,
    "eval.num_images": 64,
    "eval.num_blocks": 3,
    "eval.extractor": "pixels",
    "eval.grid": 4,
    "sampler.num_steps": 4,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "runs"


def quickstart(root: Path) -> subprocess.Popen[str]:
    sets = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    command = [sys.executable, str(ROOT / "launch" / "quickstart.py"), "--root", str(root), *sets]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def finished(root: Path) -> tuple[str, str]:
    """Ctrl-C in mid-training, then the same command to its end: what both printed."""
    outputs = []
    for interrupt in (True, False):
        process = quickstart(root)
        try:
            metrics, deadline = root / "quickstart" / "metrics.jsonl", time.monotonic() + 150
            while interrupt and process.poll() is None and time.monotonic() < deadline:
                if any(r["nimg"] >= 320 for r in read_metrics(metrics)):
                    os.killpg(process.pid, signal.SIGINT)
                    break
                time.sleep(0.05)
            outputs.append(process.communicate(timeout=180)[0])
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        expected = Stopped.exit_code if interrupt else 0
        assert process.returncode == expected, outputs[-1][-3000:]
    return outputs[0], outputs[1]


def test_interrupted_it_saves_and_the_same_command_goes_on(root, finished):
    first, second = finished
    assert "resumed at nimg" in second
    assert "2460 images" in first
    assert "2460 images" not in second  # packed once
    lines = [r["nimg"] for r in read_metrics(root / "quickstart" / "metrics.jsonl") if r["kind"] == "train"]
    assert lines == list(range(160, 1601, 160))
    assert "Traceback" not in first + second


def test_it_prints_what_the_issue_of_a_run_is(root, finished):
    second = finished[1]
    for words in ("before training", "after training", "floor", "excess over the floor", "make ui", "images/s"):
        assert words in second
    assert re.search(r"after training +[\d.]+ ± [\d.]+ over 3 blocks of seeds   \(nimg 1,600\)", second)
    page = Path(re.search(r"report   (\S+\.html)", second)[1]).read_text()
    assert "quickstart" in page
    grid = Path(re.search(r"samples  (\S+\.png)", second)[1])
    assert grid.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def ui(root: Path, finished: Any) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, str(ROOT / "launch" / "ui.py"), "--root", str(root), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line == f"MLflow: http://127.0.0.1:{port} (Ctrl-C to stop)\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read()


def test_a_sample_grid_opens_through_the_ui_after_the_quickstart_has_ended(root, ui):
    api = f"{ui}/api/2.0/mlflow"
    body = json.dumps({"experiment_ids": ["1"], "max_results": 5}).encode()
    request = urllib.request.Request(f"{api}/runs/search", body, {"Content-Type": "application/json"})
    (run,) = json.loads(get(request))["runs"]
    assert run["info"]["status"] == "FINISHED"
    assert "process.bnr" in {p["key"] for p in run["data"]["params"]}
    assert "mlflow.source.git.commit" in {t["key"] for t in run["data"]["tags"]} or "commit" in {
        t["key"] for t in run["data"]["tags"]
    }
    run_id = run["info"]["run_id"]
    history = json.loads(get(f"{api}/metrics/get-history?run_id={run_id}&metric_key=train/loss&max_results=1000"))[
        "metrics"
    ]
    assert sorted(int(m["step"]) for m in history) == list(range(160, 1601, 160))
    listed = json.loads(get(f"{api}/artifacts/list?run_id={run_id}&path=images"))["files"]
    (name,) = [file["path"] for file in listed if "+step+1600+" in file["path"] and file["path"].endswith(".png")]
    picture = get(f"{ui}/get-artifact?path={urllib.parse.quote(name, safe='')}&run_uuid={run_id}")
    grid = root / "quickstart" / "samples" / "000000001600.png"
    with Image.open(io.BytesIO(picture)) as shown, Image.open(grid) as drawn:
        assert np.array_equal(np.asarray(shown), np.asarray(drawn))
    body = json.dumps({"experiment_ids": ["1"]}).encode()
    request = urllib.request.Request(f"{api}/logged-models/search", body, {"Content-Type": "application/json"})
    (model,) = json.loads(get(request))["models"]
    assert (model["info"]["name"], model["info"]["status"]) == ("ema", "LOGGED_MODEL_READY")
