"""The MLflow mirror and a server that is down, slow, forgetful, or none at all."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.services import Services
from tests.support.mirrored_run import STEPS, end, log, make_run
from tests.support.mlflow_proxy import Proxy
from tests.support.mlflow_runs import catch_up, found, history
from tests.support.processes import wait_for
from warm_dist.errors import AccessError, UnreachableError
from warm_dist.figures import save_grid
from warm_dist.supervisor import free_port
from warm_dist.tracking import follow
from warm_dist.tracking.client import CLIENT_ENV
from warm_dist.tracking.mirror import Mirror


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder at its first attempt, nothing logged yet; its MLflow experiment has the test's name."""
    return make_run(tmp_path / "run", "http://user:hunter2@127.0.0.1:1/?token=hunter2")


def test_outages_and_lost_replies(running: Services, client: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: values sent twice after a lost reply, or dropped while the server is away."""
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
    wait_for("the mirror", lambda: len(history(client, run)) == 20)
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


def test_a_server_that_stays_away_costs_one_sentence(run: Path) -> None:
    log(run, STEPS)
    end(run, 0)
    done = catch_up(run, f"http://127.0.0.1:{free_port()}", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert done.returncode == UnreachableError.exit_code
    assert len(done.stderr.splitlines()) == 1
    assert f"python launch/mirror.py {run}" in done.stderr
    assert "Traceback" not in done.stderr


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
        (401, "application/json", b'{"error_code": "UNAUTHENTICATED", "message": "no"}'),
        (401, "text/html", b"<html>Who are you?</html>"),
        (403, "application/json", b'{"error_code": "PERMISSION_DENIED", "message": "no"}'),
        (404, "text/html", b"<html>Nothing here</html>"),
        (404, "application/json", b'{"detail": "Not Found"}'),
        (500, "text/plain", b"Internal Server Error"),
        (503, "text/plain", b""),
        (200, "text/html", b"<html>Please log in</html>"),
        (200, "application/json", b"{}"),
        (200, "application/json", b"[]"),
        (200, "application/json", b'{"experiment": {"experiment_id": []}}'),
        (302, "text/html", b""),
    ],
)
def test_a_server_that_refuses_or_is_no_mlflow_is_one_error(run: Path, status: int, kind: str, body: bytes) -> None:
    """A proxy's login page answers 200, too. Fault: whoever lacks a password is told to wait for the server."""
    error, words = UnreachableError, "" if status in (302, 500, 503) else "this is not an MLflow server"
    if status in (401, 403):
        error, words = (
            AccessError,
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )

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
        with pytest.raises(error, match=f"MLflow at {url}: .*{words}"):
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


def test_a_server_whose_answer_drips_for_ever_is_given_up(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: each read brings a byte in time, and the mirror hangs in one request."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log(run, STEPS[:2])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            near, _ = listener.accept()
            with suppress(OSError), near:
                near.sendall(b"HTTP/1.1 200 OK\r\n")
                while True:
                    near.sendall(b"X-More: x\r\n")
                    time.sleep(0.1)

        threading.Thread(target=drip, daemon=True).start()
        begun = time.monotonic()
        with pytest.raises(UnreachableError, match="the answer took longer than 2 s"):
            Mirror(run, f"http://127.0.0.1:{listener.getsockname()[1]}", "x").sync(running=True)
        assert time.monotonic() - begun < 20
