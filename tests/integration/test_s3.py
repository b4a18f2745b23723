"""A real S3 as a store: credentials, buckets, incomplete uploads, and reads that need no boto3."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.store_contract import StoreContract
from warm_dist.errors import AccessError, BucketError, DataError
from warm_dist.store.base import Store
from warm_dist.store.open import open_store
from warm_dist.store.s3 import S3Store
from warm_dist.store.seaweedfs import S3Server

BINARIES = re.compile(r"(a/)?\w+\.bin")


class TestS3(StoreContract):
    @pytest.fixture
    def store(self, s3: S3Server, tmp_path: Path) -> Store:
        return open_store(f"s3://warm-dist/store/{tmp_path.name}", s3.endpoint_url)


def test_incomplete_uploads_to_s3_are_aborted_below_the_prefix_only(s3: S3Server) -> None:
    store, other = (S3Store("warm-dist", prefix, s3.endpoint_url) for prefix in ("partial/one", "partial/other"))
    for target in (store, other):
        target.write("whole.bin", b"1")
        upload = {"Bucket": "warm-dist", "Key": target.prefix + "big.bin"}
        begun = target.client.create_multipart_upload(**upload)["UploadId"]
        target.client.upload_part(**upload, UploadId=begun, PartNumber=1, Body=b"x" * 100)

    def incomplete(prefix: str) -> list[str]:
        found = store.client.list_multipart_uploads(Bucket="warm-dist", Prefix=prefix).get("Uploads", [])
        return sorted(item["Key"] for item in found)

    assert incomplete("partial/") == ["partial/one/big.bin", "partial/other/big.bin"]
    store.discard_partials(re.compile("some/other.bin"))
    assert len(incomplete("partial/")) == 2
    store.discard_partials(BINARIES)
    assert incomplete("partial/") == ["partial/other/big.bin"]
    assert list(store.list()) == ["whole.bin"]
    other.discard_partials(BINARIES)


def test_a_known_object_is_read_without_boto3_unless_something_is_unusual(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store("warm-dist", "quick", s3.endpoint_url)
    store.write("a.bin", b"0123456789")
    etag, asked = store.stat("a.bin").etag, list[Any]()
    for client in (store.client, store.streaming):

        def counted(original: Callable[..., Any] = client.get_object, **words: Any) -> Any:
            asked.append(words)
            return original(**words)

        monkeypatch.setattr(client, "get_object", counted)
    assert store.read("a.bin") == b"0123456789"  # not known yet
    assert len(asked) == 1
    assert store.read("a.bin", 2, 3, etag) == b"234"
    assert store.read("a.bin", 0, 10, etag) == b"0123456789"
    assert len(asked) == 1
    url, made = store._presigned["a.bin"]
    store._presigned["a.bin"] = url.replace("X-Amz-Signature=", "X-Amz-Signature=0"), made  # as if it had expired
    assert store.read("a.bin", 2, 3, etag) == b"234"
    assert len(asked) == 2
    assert store.read("a.bin", 2, 3, etag) == b"234"  # by a new URL
    assert len(asked) == 2
    store.write("a.bin", b"9876543210")
    with pytest.raises(DataError, match=r"a\.bin: was replaced"):
        store.read("a.bin", 2, 3, etag)
    with pytest.raises(DataError, match=r"a\.bin: bytes 8 to 13 were asked for, it ends at 10"):
        store.read("a.bin", 8, 5, store.stat("a.bin").etag)


def test_missing_bucket_for_every_operation(s3: S3Server) -> None:
    """Fault: a missing bucket reported as a missing object or as refused credentials."""
    store = open_store("s3://no-such-bucket/data", s3.endpoint_url)
    for operation in (
        lambda: store.read("a"),
        lambda: store.write("a", b"1"),
        lambda: store.stat("a"),
        lambda: store.list(),
    ):
        with pytest.raises(BucketError, match="bucket 'no-such-bucket' does not exist"):
            operation()


def test_wrong_credentials_are_named_and_the_secret_is_not(s3: S3Server) -> None:
    for credentials in (("WRONGKEY", "verysecret"), (s3.env["AWS_ACCESS_KEY_ID"], "verysecret")):
        store = S3Store("warm-dist", "", s3.endpoint_url, credentials)
        for operation in (lambda store=store: store.read("a"), lambda store=store: store.list()):
            with pytest.raises(AccessError, match="refuses these credentials") as caught:
                operation()
            assert "verysecret" not in str(caught.value)


def test_no_credentials_at_all(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fault: boto3's own exception where no key or profile is found."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AccessError, match="no usable S3 credentials found"):
        open_store("s3://warm-dist", s3.endpoint_url).list()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessError, match="ProfileNotFound"):
        open_store("s3://warm-dist", s3.endpoint_url)
