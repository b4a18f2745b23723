"""Storage: what is written is read, what breaks off is resumed, and each failure has its own name."""

from __future__ import annotations

import http.server
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from warm_dist.errors import AccessError, BucketError, ConfigError, DataError, OutputError, UnreachableError
from warm_dist.store import base, s3
from warm_dist.store.base import Store, split_url
from warm_dist.store.open import open_store
from warm_dist.store.s3 import S3Store
from warm_dist.store.seaweedfs import S3Server

BINARIES = re.compile(r"(a/)?\w+\.bin")


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(str(tmp_path / "out"))
    server = request.getfixturevalue("s3")
    return open_store(f"s3://warm-dist/store/{tmp_path.name}", server.endpoint_url)


def test_write_read_list_stat_delete(store: Store) -> None:
    store.write("a/b.bin", b"0123456789")
    store.write("c.bin", b"x")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read("a/b.bin", 3) == b"3456789"
    assert store.read("a/b.bin", 3, 4) == b"3456"
    assert store.read("a/b.bin", 3, 0) == b""
    assert {path: stat.size for path, stat in store.list().items()} == {"a/b.bin": 10, "c.bin": 1}
    assert list(store.list("a/")) == ["a/b.bin"]
    assert store.stat("a/b.bin") == store.list()["a/b.bin"]
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert list(store.list()) == ["c.bin"]


def test_upload_and_download_of_a_file_in_several_parts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(9 << 20)  # boto3 sends 8 MiB a part
    (tmp_path / "local").write_bytes(data)
    store.upload("big.bin", tmp_path / "local")
    monkeypatch.setattr(base, "PIECE_BYTES", 2_000_000)
    store.download("big.bin", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_missing_short_and_replaced_objects(store: Store) -> None:
    with pytest.raises(DataError, match=r"none\.bin: does not exist"):
        store.read("none.bin")
    with pytest.raises(DataError, match=r"none\.bin: does not exist"):
        store.stat("none.bin")
    store.write("a.bin", b"0123456789")
    with pytest.raises(DataError, match=r"a\.bin: bytes 5 to 15 were asked for, it ends at 10"):
        store.read("a.bin", 5, 10)
    etag = store.stat("a.bin").etag
    assert store.read("a.bin", 0, 2, etag) == b"01"
    store.write("a.bin", b"9876543210")
    with pytest.raises(DataError, match=r"a\.bin: was replaced"):
        store.read("a.bin", 0, 2, etag)


def test_a_failed_file_write_leaves_the_former_file_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    store.write("a/b.bin", b"old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        store.write("a/b.bin", b"new")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["b.bin"]
    assert store.read("a/b.bin") == b"old"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        open_store(str(tmp_path / "file")).write("a.bin", b"1")


def test_remains_of_killed_writers_are_discarded_and_nothing_else(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a/b.bin", b"1")
    for name in ("a/.b.bin.4711.partial", ".c.bin.1.partial", ".e.txt.1.partial", "mine.partial", ".d.partial"):
        (tmp_path / name).write_bytes(b"half")
    store.discard_partials(BINARIES)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"a/b.bin", ".e.txt.1.partial", "mine.partial", ".d.partial"}
    open_store(str(tmp_path / "none")).discard_partials(BINARIES)


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


def test_a_server_that_does_not_know_of_incomplete_uploads_is_no_failure() -> None:
    with unsteady(refusals=9, refusal=501) as (store, handler):
        store.discard_partials(BINARIES)
        assert len(handler.requests) == 1


def test_deleting_the_last_file_removes_its_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a/b/c.bin", b"1")
    store.delete("a/b/c.bin")
    assert list(tmp_path.iterdir()) == []


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


def test_urls(tmp_path: Path) -> None:
    assert split_url("s3://bucket/a/manifest.parquet") == ("s3://bucket/a", "manifest.parquet")
    assert split_url("manifest.parquet") == (".", "manifest.parquet")
    assert split_url("/manifest.parquet") == ("/", "manifest.parquet")
    assert open_store(f"file://{tmp_path}").url == str(tmp_path)
    with pytest.raises(ConfigError, match="unknown scheme 'gs'"):
        open_store("gs://bucket/prefix")


@pytest.mark.parametrize("bucket", ["your-bucket", "<bucket>", "my-your-name"])
def test_a_placeholder_bucket_is_refused_before_any_connection(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3Store, "_session", lambda *_: pytest.fail("a client was made"))
    with pytest.raises(ConfigError, match=r"placeholder; set data\.manifest"):
        open_store(f"s3://{bucket}/data")


def test_missing_bucket_for_every_operation(s3: S3Server) -> None:
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
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AccessError, match="no usable S3 credentials found"):
        open_store("s3://warm-dist", s3.endpoint_url).list()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessError, match="ProfileNotFound"):
        open_store("s3://warm-dist", s3.endpoint_url)


def test_an_endpoint_that_does_not_answer() -> None:
    store = S3Store("warm-dist", "", "http://127.0.0.1:9", ("key", "secret"), attempts=2)
    with pytest.raises(UnreachableError, match=r"http://127\.0\.0\.1:9 does not answer") as caught:
        store.read("a")
    assert caught.value.resumable


class Unsteady(http.server.BaseHTTPRequestHandler):
    """Serves one object, breaks off after `limit` bytes of each answer, and remembers the conditions it was asked with."""

    content = bytes(range(256)) * 2000
    limit = 200_000
    trickle_s = 0.0  # between pieces of 500 bytes
    refusals, refusal, promised = 0, 503, 0  # so many requests are answered with that, and a reset
    requests: list[tuple[str | None, str | None]]
    connections: list[object] | None = None
    etag = "first"

    def setup(self) -> None:
        super().setup()
        if self.connections is not None:
            self.connections.append(self.client_address)

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.requests.append((asked, self.headers["If-Match"]))
        if len(self.requests) <= self.refusals:
            self.send_response(self.refusal)
            self.send_header("Content-Length", str(self.promised))
            self.end_headers()
            if self.promised:  # no linger: a reset, not an end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return
        if self.headers["If-Match"] not in (None, f'"{self.etag}"'):
            self.send_response(412)
            self.end_headers()
            return
        first, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        body = self.content[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{self.etag}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):  # the client has gone
            step = 500 if self.trickle_s else len(body)
            for start in range(0, min(len(body), self.limit), step):
                time.sleep(self.trickle_s)
                self.wfile.write(body[start : min(start + step, self.limit)])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "BACKOFF_S", 0.001)


@contextmanager
def unsteady(**attributes: object) -> Iterator[tuple[Store, type[Unsteady]]]:
    handler = type("Handler", (Unsteady,), {"requests": [], **attributes})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield S3Store("bucket", "", f"http://127.0.0.1:{server.server_port}", ("key", "secret"), attempts=2), handler
        server.shutdown()


def test_a_body_that_breaks_off_is_resumed_from_the_same_object() -> None:
    with unsteady() as (store, handler):
        assert store.read("a") == Unsteady.content
        assert len(handler.requests) == 3
        assert handler.requests[0] == (None, None)
        assert all(asked is not None and match == '"first"' for asked, match in handler.requests[1:])
        handler.requests.clear()
        assert store.read("a", 1000, 300_000) == Unsteady.content[1000:301_000]
        assert handler.requests[0][0] == "bytes=1000-300999"


def test_a_body_that_never_gets_through_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PATIENCE_S", 0.3)
    with unsteady(limit=0) as (store, handler):
        with pytest.raises(UnreachableError, match=r"a: the body .*; given up after \d+ attempts and 0 bytes"):
            store.read("a")
        assert len(handler.requests) > 5


def test_a_body_that_advances_is_resumed_as_often_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte buys time: 512 kB in pieces of 5 kB take 103 requests, whatever the patience without progress."""
    monkeypatch.setattr(s3, "PATIENCE_S", 0.3)
    monkeypatch.setattr(s3, "BACKOFF_S", 0.0)
    monkeypatch.setattr(s3, "SLOWEST", 20_000)
    with unsteady(limit=5_000) as (store, handler):
        assert store.read("a", etag="first") == Unsteady.content
        assert len(handler.requests) == 103
        handler.requests.clear()
        monkeypatch.setattr(s3, "PATIENCE_S", 0.0)
        monkeypatch.setattr(s3, "SLOWEST", 1e12)  # too slow for this
        with pytest.raises(UnreachableError, match="given up after 1 attempts and 5000 bytes"):
            store.read("a", etag="first")


def test_a_trickle_is_broken_off_and_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recv brings something in time, so no silence is ever long; only the whole body's deadline ends it."""
    monkeypatch.setattr(s3, "BODY_S", 0.05)
    with unsteady(trickle_s=0.02) as (store, handler):
        assert store.read("a", 0, 3000, "first") == Unsteady.content[:3000]
        starts = [int(str(asked).removeprefix("bytes=").split("-")[0]) for asked, _ in handler.requests]
        assert len(starts) > 1
        assert starts == sorted(set(starts))  # progress is kept


def test_streaming_is_patient_and_a_first_contact_is_not() -> None:
    """503 beyond boto3's own attempts, twice: a known object is asked for again, an unknown one is an error at once."""
    with unsteady(refusals=4) as (store, handler):
        assert store.read("a", 0, 1000, "first") == Unsteady.content[:1000]
        assert len(handler.requests) == 5
    with unsteady(refusals=4) as (store, handler):
        with pytest.raises(UnreachableError, match=r"the server failed \(503"):
            store.read("a", 0, 1000)
        assert len(handler.requests) == 2


def test_an_error_whose_own_body_breaks_off_is_an_unsteady_network() -> None:
    with unsteady(refusals=1, refusal=412, promised=100) as (store, handler):
        assert store.read("a", 0, 1000, "first") == Unsteady.content[:1000]
        assert len(handler.requests) == 2
    with unsteady(refusals=9, refusal=412, promised=100) as (store, handler), pytest.raises(UnreachableError):
        store.read("a", 0, 1000)


def test_connections_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    with unsteady(limit=1 << 20, protocol_version="HTTP/1.1", connections=[]) as (store, handler):
        for start in range(0, 500_000, 100_000):
            assert store.read("a", start, 3000, "first") == Unsteady.content[start : start + 3000]
        assert len(handler.connections) == 1  # type: ignore[attr-defined]


def test_an_object_replaced_between_two_parts_is_not_glued_together() -> None:
    with unsteady() as (store, handler):
        original = handler.do_GET

        def once_then_other(self: Unsteady) -> None:
            original(self)
            type(self).etag = "second"

        handler.do_GET = once_then_other  # type: ignore[method-assign]
        with pytest.raises(DataError, match="was replaced"):
            store.read("a")


@pytest.mark.slow
def test_only_the_store_knows_boto3_and_imports_are_cheap() -> None:
    code = "import sys, data_pipelines.reading.loader, data_pipelines.pack; print([m for m in ('boto3', 'pyarrow', 'webdataset', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    package = Path(__file__).parent.parent / "data_pipelines"
    knowing = {
        path.name
        for path in package.glob("*.py")
        if "import boto" in path.read_text() or "from boto" in path.read_text()
    }
    assert knowing == {"s3_store.py"}
