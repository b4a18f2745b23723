"""Answers of a server that break off, trickle or change: resumed from the same object, or one error."""

from __future__ import annotations

import http.server
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from warm_dist.errors import DataError, UnreachableError
from warm_dist.store import s3, s3_answers
from warm_dist.store.base import Store
from warm_dist.store.s3 import S3Store

BINARIES = re.compile(r"(a/)?\w+\.bin")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "BACKOFF_S", 0.001)


def test_a_server_that_does_not_know_of_incomplete_uploads_is_no_failure() -> None:
    with unsteady(refusals=9, refusal=501) as (store, handler):
        store.discard_partials(BINARIES)
        assert len(handler.requests) == 1


def test_an_endpoint_that_does_not_answer() -> None:
    """Fault: a refused connection that surfaces as boto3's own exception, or is not marked as resumable."""
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
        first, _, end = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        body = self.content[int(first) : int(end) + 1 if end else None]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{self.etag}"')
        if asked:
            last = int(first) + len(body) - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):  # the client has gone
            step = 500 if self.trickle_s else len(body)
            for start in range(0, min(len(body), self.limit), step):
                time.sleep(self.trickle_s)
                self.wfile.write(body[start : min(start + step, self.limit)])

    def log_message(self, *args: object) -> None:
        pass


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
    monkeypatch.setattr(s3, "PATIENCE_S", 1.0)
    monkeypatch.setattr(s3, "BACKOFF_S", 0.001)
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
    monkeypatch.setattr(s3_answers, "BODY_S", 0.05)
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
