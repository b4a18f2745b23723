"""The MLflow mirror against a real server: every value exactly once, whatever is killed, lost or down."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from launch import evaluate
from launch import mirror as command
from launch.services import Services, services
from tests.support.mirrored_run import STEPS, end, log, make_run
from warm_dist import supervisor
from warm_dist.errors import ConfigError, UnreachableError
from warm_dist.figures import save_grid
from warm_dist.files import read_json, write_json
from warm_dist.runs.metrics import MetricsLog
from warm_dist.supervisor import free_port
from warm_dist.tracking import follow
from warm_dist.tracking.client import CLIENT_ENV, log_finished, open_parent
from warm_dist.tracking.follow import start_mirror
from warm_dist.tracking.mirror import Mirror

MIRROR = str(Path(command.__file__))


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with services(tmp_path_factory.mktemp("services")) as servers:
        yield servers


@pytest.fixture
def client(running: Services, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in CLIENT_ENV.items():
        monkeypatch.setenv(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=running.mlflow_url)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder at its first attempt, nothing logged yet; its MLflow experiment has the test's name."""
    return make_run(tmp_path / "run", "http://user:hunter2@127.0.0.1:1/?token=hunter2")


def catch_up(path: Path, url: str, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, MIRROR, str(path), "--url", url]
    return subprocess.run(line, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def found(client: Any, path: Path) -> Any:
    """The one MLflow run of the folder, found by its experiment: a second one would be a duplicate."""
    experiment = client.get_experiment_by_name(path.parent.name)
    (only,) = client.search_runs([experiment.experiment_id])
    return only


def history(client: Any, path: Path, key: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(found(client, path).info.run_id, key))


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Proxy:
    """A port in front of the server: slow, closed, or losing replies after the request has arrived."""

    def __init__(self, url: str, delay_s: float = 0.0) -> None:
        self.target = int(url.rpartition(":")[2])
        self.delay_s = delay_s  # of each request
        self.loses_replies_to = b"never"
        self.requests = 0
        self.open: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._forward, args=(self.listener.accept()[0],), daemon=True).start()

    def _forward(self, near: socket.socket) -> None:
        far = socket.create_connection(("127.0.0.1", self.target))
        self.open.append(near)
        doomed = threading.Event()

        def replies() -> None:
            with contextlib.suppress(OSError):
                while part := far.recv(1 << 20):
                    if doomed.is_set():
                        break
                    near.sendall(part)
                near.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=replies, daemon=True).start()
        with contextlib.suppress(OSError), far:
            while part := near.recv(1 << 20):
                if re.match(rb"[A-Z]+ /", part):
                    self.requests += 1
                    time.sleep(self.delay_s)
                if self.loses_replies_to in part:
                    doomed.set()
                far.sendall(part)

    def close(self) -> None:
        for sock in [self.listener, *self.open]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


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
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
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
    make_run(run, running.mlflow_url)
    log(run, STEPS[:20])
    first = start_mirror(run)
    wait_until(lambda: (read_json(run / "mirror.json") or {}).get("offset"))
    first.kill()
    first.wait()
    log(run, STEPS[20:])
    (run / "mirror.json").write_text('{"run_id": "", "offset": 0}')  # and its memory is gone, too
    second = start_mirror(run)
    wait_until(lambda: (read_json(run / "mirror.json") or {}).get("offset"))
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
    code = (
        f"from pathlib import Path; from launch.mirror import start_mirror; print(start_mirror(Path({str(run)!r})).pid)"
    )
    owner = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert owner.returncode == 0, owner.stderr
    mirror = supervisor.identity(int(owner.stdout))
    wait_until(lambda: not supervisor.alive(mirror))
    assert history(client, run) == [(n, 1 / n) for n in STEPS]
    assert found(client, run).info.status == "KILLED"


def test_outages_and_lost_replies(running: Services, client: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    proxy = Proxy(running.mlflow_url)
    mirror = Mirror(run, proxy.url, run.parent.name, "trial")
    log(run, STEPS[:10])
    assert mirror.sync(running=True) == 20
    assert mirror.sync(running=True) == 0
    log(run, STEPS[10:20])
    proxy.loses_replies_to = b"log-batch"  # the server takes the values, and nobody hears of it
    with pytest.raises(UnreachableError):
        mirror.sync(running=True)
    wait_until(lambda: len(history(client, run)) == 20)
    log(run, STEPS[20:30])
    proxy.loses_replies_to = b"never"
    assert mirror.sync(running=True) == 40, "the part that may have arrived, as it was, and what is new"
    assert history(client, run) == [(n, 1 / n) for n in STEPS[:30]]

    proxy.close()
    log(run, STEPS[30:])
    end(run, 0)
    monkeypatch.setattr(follow, "LAST_TRIES", 1)
    with pytest.raises(UnreachableError, match=r"python launch/mirror\.py"):
        follow._finish(Mirror(run, proxy.url, run.parent.name), 1, None)
    assert catch_up(run, running.mlflow_url).returncode == 0
    assert history(client, run) == [(n, 1 / n) for n in STEPS]
    assert found(client, run).info.status == "FINISHED"


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


def test_a_server_that_stays_away_costs_one_sentence(run: Path) -> None:
    log(run, STEPS)
    end(run, 0)
    done = catch_up(run, f"http://127.0.0.1:{free_port()}", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert done.returncode == UnreachableError.exit_code
    assert len(done.stderr.splitlines()) == 1
    assert f"python launch/mirror.py {run}" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_mirror_is_cheap() -> None:
    """It runs beside training: torch, mlflow and matplotlib would cost seconds and memory before they are needed."""
    code = "import sys, launch.mirror; print([m for m in ('torch', 'mlflow', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_computation_that_is_no_training_is_one_finished_run(running: Services, client: Any, tmp_path: Path) -> None:
    picture = tmp_path / "spectrum.json"
    picture.write_text("{}")
    secret = "s3://key:hunter2@bucket/manifest.parquet"

    def send(identity: str, metrics: dict[tuple[str, int], float]) -> str:
        return log_finished(
            *(running.mlflow_url, tmp_path.name, "spectrum-1", identity),
            params={"manifest": secret}, metrics=metrics, files=[picture],
        )  # fmt: skip

    run_id = send("a", {("bnr", 0): 0.4})
    assert send("a", {("bnr", 0): 0.5, ("bnr", 9): 0.6}) == run_id, "what is new of the same computation"
    assert send("b", {}) != run_id
    found = client.get_run(run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "spectrum-1")
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "bnr")] == [(0, 0.4), (9, 0.6)]
    assert found.data.params == {"manifest": "s3://bucket/manifest.parquet"}
    assert [file.path for file in client.list_artifacts(run_id)] == ["spectrum.json"]
    assert client.get_experiment(found.info.experiment_id).name == tmp_path.name
    with pytest.raises(ConfigError, match="needs the URL of a server"):
        log_finished("sqlite:///mlflow.db", "x", "y", "z", params={}, metrics={}, files=[])


def test_a_trial_is_one_run_under_its_parent_through_all_retries(running: Services, client: Any, run: Path) -> None:
    url, experiment = running.mlflow_url, run.parent.name
    parent = open_parent(url, experiment, "sweep", "sweep-1", {"space": "bnr"})
    assert open_parent(url, experiment, "sweep", "sweep-1", {"space": "bnr"}) == parent
    log(run, STEPS[:10])
    Mirror(run, url, experiment, "trial", parent).sync(running=True)
    (run / "mirror.json").unlink()
    log(run, STEPS[10:20], attempt=2)
    Mirror(run, url, experiment, "trial", parent).sync(running=True)
    identifier = client.get_experiment_by_name(experiment).experiment_id
    trials = client.search_runs([identifier], f"tags.mlflow.parentRunId = '{parent}'")
    assert [trial.info.run_name for trial in trials] == ["trial"]
    assert len(client.search_runs([identifier])) == 2
    assert len(client.get_metric_history(trials[0].info.run_id, "train/loss")) == 20


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
    write_json(run / "mirror.json", {**before, "sending": read_json(run / "mirror.json")["offset"]})
    log(run, STEPS[10:30], attempt=2, scale=2.0)
    mirror = Mirror(run, running.mlflow_url, run.parent.name)
    assert mirror.sync(running=True) == 20 + 20
    assert history(client, run) == [(n, 1 / n) for n in STEPS[:20]] + [(n, 2 / n) for n in STEPS[20:30]]
    assert read_json(run / "mirror.json")["sending"] is None


def test_a_slow_server_gets_one_request_for_what_is_new(running: Services, client: Any, run: Path) -> None:
    proxy = Proxy(running.mlflow_url, delay_s=0.2)
    mirror = Mirror(run, proxy.url, run.parent.name)
    for k in range(4):
        log(run, STEPS[10 * k : 10 * k + 10])
        before = proxy.requests
        assert mirror.sync(running=True) == 20
        assert k == 0 or proxy.requests == before + 1
    assert history(client, run) == [(n, 1 / n) for n in STEPS]
    proxy.close()
    assert float(CLIENT_ENV["MLFLOW_HTTP_REQUEST_TIMEOUT"]) > 30, "an answer may take half a minute"
    assert CLIENT_ENV["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0", "MLflow's own would make a run twice"


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (403, "application/json", b'{"error_code": "PERMISSION_DENIED", "message": "no"}'),
        (500, "text/plain", b"Internal Server Error"),
        (503, "text/plain", b""),
        (200, "text/html", b"<html>Please log in</html>"),
        (200, "application/json", b"{}"),
        (200, "application/json", b"[]"),
        (302, "text/html", b""),
    ],
)
def test_a_server_that_refuses_or_is_no_mlflow_is_one_error(run: Path, status: int, kind: str, body: bytes) -> None:
    """A proxy's login page answers 200, too."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/login")
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_HEAD = answer

        def log_message(self, *_: Any) -> None:
            pass

    log(run, STEPS)
    end(run, 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(UnreachableError, match=f"MLflow at {url}"):
            Mirror(run, url, "refused").sync(running=True)
        server.shutdown()
    assert not (run / "mirror.json").exists()


def test_an_artifact_store_that_fails_delays_no_value_and_no_end(
    running: Services, client: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that proxies no artifacts leaves the client to its own file system, where it gets an OSError."""
    from mlflow import MlflowClient

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no such place")

    for name in ("log_text", "log_image", "log_artifact"):
        monkeypatch.setattr(MlflowClient, name, refuse)
    log(run, STEPS[:10])
    save_grid(np.zeros((1, 3, 4, 4), np.uint8), run / "samples" / "000000000032.png", columns=1)
    mirror = Mirror(run, running.mlflow_url, run.parent.name)
    for k in (10, 20):
        with pytest.raises(UnreachableError, match="PermissionError: no such place"):
            mirror.sync(running=True)
        assert len(history(client, run)) == k
        log(run, STEPS[k : k + 10])
    with pytest.raises(UnreachableError):
        mirror.finish("FAILED", {"exit.reason": "x"}, 1e9, pytest.fail)
    assert found(client, run).info.status == "FAILED"
    assert len(history(client, run)) == 30
    monkeypatch.undo()
    (run / "samples" / "000000000064.png").write_bytes(b"half a picture")
    Mirror(run, running.mlflow_url, run.parent.name).sync(running=False)
    assert len(client.list_artifacts(found(client, run).info.run_id, "images")) == 2, "the damaged one is passed over"


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


def test_an_evaluation_is_a_run_under_its_training(
    running: Services, client: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One curve over NFE for each BNR; done again it is the same run, with more blocks or another sampler another."""
    log(run, STEPS[:5])
    Mirror(run, running.mlflow_url, run.parent.name).sync(running=True)
    tracking = SimpleNamespace(mlflow_url=running.mlflow_url, experiment=run.parent.name)
    network: Any = SimpleNamespace(config=SimpleNamespace(tracking=tracking), weights=run, say=print)
    (tmp_path / "table.csv").write_text("bnr,nfe\n")

    def send(eta: float, blocks: int, url: str | None = None) -> None:
        facts = {"name": "Fréchet distance (lite0)", "measure": "m", "num_images": 64, "sha256": "s", "method": "heun"}
        lines = [
            facts | {"bnr": bnr, "nfe": nfe, "frechet": 10.0 * nfe + float(bnr), "floor": 1.0, "sampler": f"eta {eta}"}
            | {"spec": f"{bnr}-{nfe}-{eta}", "per_block": [{}] * blocks}
            for bnr in ("0", "0.5") for nfe in (9, 35)
        ]  # fmt: skip
        evaluate._log(network, lines, cast(Any, SimpleNamespace(mlflow_url=url, out=tmp_path)))

    def children() -> list[Any]:
        parent = f"tags.mlflow.parentRunId = '{read_json(run / 'mirror.json')['run_id']}'"
        return list(client.search_runs([client.get_experiment_by_name(run.parent.name).experiment_id], parent))

    send(0.0, 3)
    send(0.0, 3)
    (child,) = children()
    assert (child.info.run_name, child.info.status) == ("evaluate-run", "FINISHED")
    curve = client.get_metric_history(child.info.run_id, "frechet/heun/bnr_0.5")
    assert sorted((m.step, m.value) for m in curve) == [(9, 90.5), (35, 350.5)]
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["table.csv"]
    send(0.0, 5)
    send(1.0, 3)
    assert len(children()) == 3
    assert capsys.readouterr().out == ""
    send(0.0, 3, f"http://127.0.0.1:{free_port()}")
    assert "not logged: MLflow at" in capsys.readouterr().out
