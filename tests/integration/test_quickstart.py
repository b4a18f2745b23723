"""The quickstart as a user runs it, in small: interrupted, gone on, finished, and its pictures seen through `make ui`."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.services import services
from tests.support.family import descendants, ends_cleanly
from tests.support.planted import Planted
from tests.support.processes import MARK, ROOT, free_port, wait_for
from tests.support.training import reached
from tests.support.watch import Watch, listening, telling
from warm_dist.errors import OutputError, Stopped
from warm_dist.runs.metrics import read_metrics

pytestmark = pytest.mark.timeout(900)
SMALL = {
    "network.channels": 8,
    "network.channel_mult": [1, 2],
    "train.total_nimg": 960,
    "train.lr_decay_nimg": 0,
    "train.log_nimg": 160,
    "train.save_nimg": 480,
    "eval.eval_nimg": 960,
    "eval.num_images": 64,
    "eval.num_blocks": 3,
    "eval.extractor": "pixels",
    "eval.grid": 4,
    "sampler.num_steps": 4,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "runs"


def quickstart(root: Path, planted: Planted, mark: str = "") -> subprocess.Popen[str]:
    sets = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    command = [sys.executable, str(ROOT / "launch" / "quickstart.py"), "--root", str(root), *sets]
    return subprocess.Popen(
        command,
        env={**os.environ, **planted.env, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def said(process: subprocess.Popen[str], code: int) -> str:
    """All that it printed, when it has ended with this code."""
    try:
        text, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, text[-3000:]
    return text


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """For both commands; those of the embedded S3 are added once it has made them."""
    return Planted(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def watch(root: Path, planted: Planted) -> Watch:
    """Looks at the first command's processes."""
    return Watch(str(root), planted.secrets)


@pytest.fixture(scope="module")
def finished(root: Path, planted: Planted, watch: Watch) -> tuple[str, str]:
    """Ctrl-C in mid-training, then the same command to its end: what both printed."""
    first = quickstart(root, planted, watch.mark)
    wait_for("credentials", lambda: (root / "s3" / "s3.json").exists() or first.poll() is not None)
    planted.secrets.append(secret_key(root))
    with watch:
        wait_for("steps", lambda: reached(root / "quickstart") >= 320 or first.poll() is not None, 400)
    os.killpg(first.pid, signal.SIGINT)
    return said(first, Stopped.exit_code), said(quickstart(root, planted), 0)


def test_interrupted_it_saves_and_the_same_command_goes_on(root, finished):
    first, second = finished
    assert "resumed at nimg" in second
    assert "2460 images" in first
    assert "2460 images" not in second  # packed once
    lines = [r["nimg"] for r in read_metrics(root / "quickstart" / "metrics.jsonl") if r["kind"] == "train"]
    assert lines == list(range(160, 961, 160))
    assert "Traceback" not in first + second


def secret_key(root: Path) -> str:
    """Of the embedded S3, in its private folder."""
    identities = json.loads((root / "s3" / "s3.json").read_text())["identities"]
    return str(identities[0]["credentials"][0]["secretKey"])


def test_it_listens_on_loopback_and_tells_no_secret(root, finished, planted, watch):
    """Fault: a port of a server, of the launcher or of a rank that other machines reach; a key in a log or a command line."""
    assert watch.addresses == {"127.0.0.1"}
    assert watch.told - {str(root / "s3" / "s3.json"), str(planted.file)} == set()
    assert (root / "s3").stat().st_mode & 0o077 == 0
    assert telling(root.rglob("*"), planted.secrets) == {str(root / "s3" / "s3.json")}
    assert planted.told(*finished) == []


def test_it_prints_what_the_issue_of_a_run_is(root, finished):
    """Fault: a summary without the floor or the spread, or with the path of a file that does not exist."""
    second = finished[1]
    for words in ("before training", "after training", "floor", "excess over the floor", "make ui", "images/s"):
        assert words in second
    assert re.search(r"after training +[\d.]+ ± [\d.]+ over 3 blocks of seeds   \(nimg 960\)", second)
    page = Path(re.search(r"report   (\S+\.html)", second)[1]).read_text()
    assert "quickstart" in page
    grid = Path(re.search(r"samples  (\S+\.png)", second)[1])
    assert grid.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def ui(root: Path, finished: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`make ui` and its address."""
    port = free_port()
    command = [sys.executable, str(ROOT / "launch" / "ui.py"), "--root", str(root), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == f"MLflow: http://127.0.0.1:{port} (Ctrl-C to stop)\n"
        yield process, f"http://127.0.0.1:{port}"
        assert ends_cleanly(process, signal.SIGTERM)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read()


def test_a_sample_grid_opens_through_the_ui_after_the_quickstart_has_ended(root, ui):
    _, address = ui
    api = f"{address}/api/2.0/mlflow"
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
    assert sorted(int(m["step"]) for m in history) == list(range(160, 961, 160))
    listed = json.loads(get(f"{api}/artifacts/list?run_id={run_id}&path=images"))["files"]
    (name,) = [file["path"] for file in listed if "+step+960+" in file["path"] and file["path"].endswith(".png")]
    picture = get(f"{address}/get-artifact?path={urllib.parse.quote(name, safe='')}&run_uuid={run_id}")
    grid = root / "quickstart" / "samples" / "000000000960.png"
    with Image.open(io.BytesIO(picture)) as shown, Image.open(grid) as drawn:
        assert np.array_equal(np.asarray(shown), np.asarray(drawn))
    body = json.dumps({"experiment_ids": ["1"]}).encode()
    request = urllib.request.Request(f"{api}/logged-models/search", body, {"Content-Type": "application/json"})
    (model,) = json.loads(get(request))["models"]
    assert (model["info"]["name"], model["info"]["status"]) == ("ema", "LOGGED_MODEL_READY")


def test_ui_serves_on_loopback_alone_and_one_at_a_time(root, ui):
    process, address = ui
    assert b"MLflow" in get(address)
    family = descendants(process.pid)
    assert len(family) == 6, "ui; for each server a supervisor; weed; mlflow and its one worker: no job runners"
    assert listening(family) == {"127.0.0.1"}
    with pytest.raises(OutputError, match="another make quickstart, make sweep or make ui"), services(root):
        pass
