"""Credentials of MLflow's own S3 client, which are rotated while a mirror runs."""

from __future__ import annotations

import boto3
import pytest
from mlflow.store.artifact import s3_artifact_repo

from warm_dist.errors import UnreachableError
from warm_dist.tracking.client import reaching

URL = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    s3_artifact_repo._cached_get_s3_client.cache_clear()


def key_in_use():
    return s3_artifact_repo._get_s3_client(s3_endpoint_url=URL)._request_signer._credentials.access_key


def test_they_are_read_again_after_a_refusal(tmp_path):
    """Fault: the mirror keeps the refused ones until its last try."""

    def rotate(key):
        (tmp_path / "keys").write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")

    rotate("first")
    assert key_in_use() == "first"
    rotate("second")
    assert key_in_use() == "first"
    text = f"ExpiredToken.*; check AWS_ACCESS_KEY_ID, AWS_PROFILE or {tmp_path}/keys, which the next try reads again"
    with pytest.raises(UnreachableError, match=text), reaching(URL):
        raise RuntimeError("An error occurred (ExpiredToken) when calling PutObject")
    assert key_in_use() == "second"


def test_an_outage_says_nothing_of_credentials():
    with pytest.raises(UnreachableError) as caught, reaching(URL):
        raise ConnectionError("refused")
    assert "AWS_" not in str(caught.value)
