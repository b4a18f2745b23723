"""Credentials that are rotated: the file gets a new key in mid-run, and the server refuses the old one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from data_pipelines.pack import pack
from data_pipelines.sources.open import open_source
from tests.support.faulty_proxy import FaultyProxy
from tests.support.packed import Packed
from tests.support.processes import wait_for
from tests.support.training import BATCH, digits_config, finish, fork, outcome, reached
from warm_dist.errors import UnreachableError
from warm_dist.runs.metrics import read_metrics
from warm_dist.store.s3 import S3Store
from warm_dist.store.seaweedfs import S3Server
from warm_dist.tracking.client import reaching

KEYS = [("FIRSTKEY0123456789AB", "first-secret-" * 3), ("SECONDKEY0123456789A", "second-secret-" * 3)]
TOTAL = 120 * BATCH


class Rotating:
    """A server of two identities behind a proxy, and a credentials file that has the first one."""

    def __init__(self, folder: Path, server: S3Server, proxy: FaultyProxy) -> None:
        self.file, self.server, self.proxy = folder / "credentials", server, proxy
        self.write(0)

    def write(self, number: int) -> None:
        key, secret = KEYS[number]
        new = self.file.with_suffix(".new")
        new.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
        new.replace(self.file)

    def rotate(self) -> None:
        self.write(1)
        self.proxy.expired = KEYS[0][0]


@pytest.fixture
def rotating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rotating]:
    folder = tmp_path / "s3"
    folder.mkdir()
    actions = ["Read", "Write", "List", "Tagging"]
    users = [{"name": k, "credentials": [{"accessKey": k, "secretKey": s}], "actions": actions} for k, s in KEYS]
    (folder / "s3.json").write_text(json.dumps({"identities": users}))
    with S3Server(folder, "warm-dist") as server, FaultyProxy(server.endpoint_url) as proxy:
        found = Rotating(tmp_path, server, proxy)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(found.file))
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield found


def test_a_run_goes_on_with_the_new_key(rotating: Rotating, tmp_path: Path) -> None:
    """Fault: code 7 in mid-run, nothing saved or sent, though the file holds a valid key. Shards, checkpoints and their lease."""
    proxy, url, run = rotating.proxy, "s3://warm-dist/digits", tmp_path / "run"
    packed = Packed(url, proxy.url, pack(open_source("digits", 8), url, proxy.url, shard_size=500))
    settings = ["engine=local", f"train.total_nimg={TOTAL}", f"train.save_nimg={TOTAL // 4}"]
    settings += ["data.buffer_bytes=20000", "data.window=32", "checkpoint.url=s3://warm-dist/run"]
    settings += [f"checkpoint.endpoint_url={proxy.url}"]
    process = fork(digits_config(tmp_path, packed), run, *settings, env=dict(os.environ))
    wait_for("some steps", lambda: reached(run) >= 4 * BATCH or process.poll() is not None)
    rotating.rotate()
    at = reached(run)
    code, _, err = finish(process)
    assert (code, outcome(run)["code"]) == (0, 0), err
    assert at < TOTAL // 2, "before most was read and sent"
    assert [r["failed"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "upload"] == [0.0] * 4
    store = S3Store("warm-dist", "run", rotating.server.endpoint_url, KEYS[1])
    assert f"checkpoints/{TOTAL:012d}/COMPLETE" in store.list()
    assert proxy.requests > 20


def test_the_mirror_s_artifacts_go_on_at_the_next_try(
    rotating: Rotating, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own client sends artifacts straight to S3, where the server does not pass them on."""
    from mlflow.store.artifact import s3_artifact_repo

    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", rotating.proxy.url)
    s3_artifact_repo._cached_get_s3_client.cache_clear()
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"1")

    def send() -> None:
        with reaching("http://127.0.0.1:1"):
            s3_artifact_repo.S3ArtifactRepository("s3://warm-dist/mlflow/1").log_artifact(str(picture))

    send()
    rotating.rotate()
    picture.write_bytes(b"22")
    with pytest.raises(UnreachableError, match=r"InvalidAccessKeyId.*credentials, which the next try reads again"):
        send()
    send()
    store = S3Store("warm-dist", "mlflow/1", rotating.server.endpoint_url, KEYS[1])
    assert store.read("picture.png") == b"22"
