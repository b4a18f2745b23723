"""Which store a URL names."""

from __future__ import annotations

from pathlib import Path

import pytest

from warm_dist.errors import ConfigError
from warm_dist.store.base import split_url
from warm_dist.store.open import open_store
from warm_dist.store.s3 import S3Store


def test_urls(tmp_path: Path) -> None:
    """Fault: splitting a URL loses the root or the current folder, or an unknown scheme is taken for a folder."""
    assert split_url("s3://bucket/a/manifest.parquet") == ("s3://bucket/a", "manifest.parquet")
    assert split_url("manifest.parquet") == (".", "manifest.parquet")
    assert split_url("/manifest.parquet") == ("/", "manifest.parquet")
    assert open_store(f"file://{tmp_path}").url == str(tmp_path)
    with pytest.raises(ConfigError, match="needs s3://bucket/prefix or a path"):
        open_store("gs://bucket/prefix")


@pytest.mark.parametrize(
    ("url", "endpoint"), [("s3://k:s@b/x", None), ("s3://b/x", "http://k:s@h"), ("s3://b/x?token=s", None)]
)
def test_credentials_in_a_url_are_refused_unseen(url: str, endpoint: str | None) -> None:
    """Fault: `--endpoint-url http://key:secret@host`, or a command's URL, is told in each of its errors."""
    with pytest.raises(ConfigError, match="credentials come from the environment: AWS_ACCESS_KEY_ID") as refused:
        open_store(url, endpoint)
    assert "k:s" not in str(refused.value)
    assert "token=s" not in str(refused.value)


@pytest.mark.parametrize("bucket", ["your-bucket", "<bucket>", "my-your-name"])
def test_a_placeholder_bucket_is_refused_before_any_connection(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3Store, "_connect", lambda *_: pytest.fail("a client was made"))
    with pytest.raises(ConfigError, match=r"placeholder; set data\.manifest"):
        open_store(f"s3://{bucket}/data")


@pytest.mark.parametrize("url", ["ftp://x", "http://127.0.0.1:99999", "http://:80", "http://x:0", "https://", "x:80"])
def test_what_is_no_server_is_refused_as_an_endpoint(url: str) -> None:
    """Fault: botocore's EndpointResolutionError at the first request."""
    with pytest.raises(ConfigError, match=r"needs the URL of a server, http://… or https://…$"):
        open_store("s3://bucket/x", url)
