"""What an S3 server's answer to a presigned request means."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from warm_dist.errors import AccessError, UnreachableError
from warm_dist.store.s3 import S3Store


@pytest.fixture
def store() -> S3Store:
    return S3Store("bucket", endpoint_url="http://127.0.0.1:9", credentials=("key", "secret"))


def answer(store: S3Store, status: int, monkeypatch: pytest.MonkeyPatch) -> object:
    """What the quick request makes of this status."""
    reply = SimpleNamespace(status_code=status, raw=io.BytesIO(), headers={})
    monkeypatch.setattr(store.streaming._endpoint.http_session, "send", lambda request: reply)
    return store._quick_get("a.bin", {})


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_with_too_much_to_do_is_not_asked_again_at_once(
    store: S3Store, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: an answer 429, too many requests, is taken for a refusal and repeated without a pause."""
    with pytest.raises(UnreachableError, match=rf"a\.bin: the server failed \({status}\)"):
        answer(store, status, monkeypatch)


@pytest.mark.parametrize("status", [400, 403, 412, 428])
def test_a_refusal_is_repeated_with_a_new_url(store: S3Store, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a presigned URL whose credentials have expired is used again until its time is over."""
    assert answer(store, status, monkeypatch) is None
    assert store._presigned == {}


def test_a_refused_key_is_read_again_and_known_only_with_its_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: code 7, though the file has a new key; or another thread sees it beside the old clients, and gives up."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    file.write_text("[default]\naws_access_key_id = first\naws_secret_access_key = s\n")
    rotated = S3Store("bucket", "", "http://127.0.0.1:1")
    file.write_text(file.read_text().replace("first", "second"))
    known: list[str] = []
    connect = rotated._connect
    monkeypatch.setattr(rotated, "_connect", lambda *how: known.append(rotated._keys.access_key) or connect(*how))

    def request() -> str:
        used = str(rotated.client._request_signer._credentials.access_key)
        if used == "first":
            raise AccessError("refused")
        return used

    assert rotated._call("x", request) == "second"
    assert known == ["first", "first"]
