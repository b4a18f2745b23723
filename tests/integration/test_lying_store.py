"""Servers that are no S3, or something that stands before one: nothing they answer is taken for an object or a list."""

from __future__ import annotations

import http.server
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.checkpoints import Fixture
from warm_dist.errors import CheckpointError, ConfigError, UnreachableError, WarmDistError
from warm_dist.store import s3
from warm_dist.store.base import Store
from warm_dist.store.s3 import S3Store
from warm_dist.store.s3_answers import OddAnswerError

CONTENT = bytes(range(256)) * 8
HTML = b"<html><body>Sign in to the guest network</body></html>"
LIST = (
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
    b"<IsTruncated>false</IsTruncated>%s</ListBucketResult>"
)
ITEM = b'<Contents><Key>%s</Key><Size>3</Size><ETag>"e"</ETag></Contents>'
Reply = tuple[int, dict[str, str], bytes]
Script = Callable[[int, str, str], Reply | None]
"""(number of the request, method, the bytes it asks for) → status, headers and body; None: drips headers for ever."""


class Liar:
    """A server on loopback that answers by `script`, and the store that it would be."""

    script: Script
    url: str
    store: Store


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    out = Liar()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        count = 0

        def answer(self) -> None:
            Handler.count += 1
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = out.script(Handler.count, self.command, self.headers.get("Range", "").removeprefix("bytes="))
            with suppress(OSError):
                if reply is None:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                    while True:
                        self.wfile.write(b"X-More: x\r\n")
                        time.sleep(0.05)
                status, headers, body = reply
                self.send_response(status)
                self.send_header("Connection", "close")
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)
            self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        out.url = f"http://127.0.0.1:{listening.server_port}"
        out.store = S3Store("bucket", "run", out.url, ("key", "secret"), attempts=1)
        yield out
        listening.shutdown()


def part(first: int, last: int, size: int = len(CONTENT), **headers: str) -> Reply:
    named = {"ETag": '"e"', "Content-Range": f"bytes {first}-{last}/{size}", **headers}
    return 206, named, CONTENT[first : last + 1]


LISTS = {
    "html": (200, {"Content-Type": "text/html"}, HTML),
    "broken html": (200, {}, b"<html><br><p>"),
    "nothing": (200, {}, b""),
    "json": (200, {}, b'{"keys": []}'),
    "an error as 200": (200, {}, b"<Error><Code>InternalError</Code></Error>"),
    "no name": (200, {}, (LIST % b"").replace(b"<Name>bucket</Name>", b"")),
    "no end": (200, {}, (LIST % b"").replace(b"<IsTruncated>false</IsTruncated>", b"")),
    "other names": (200, {}, LIST % (ITEM % b"elsewhere/a")),
    "no size": (200, {}, LIST % (ITEM % b"run/a").replace(b"<Size>3</Size>", b"")),
    "the same page again": (200, {}, (LIST % (ITEM % b"run/a" + b"<NextContinuationToken>t</NextContinuationToken>")).replace(b"false", b"true")),
    "404 in html": (404, {}, HTML),
}  # fmt: skip


@pytest.mark.parametrize("kind", LISTS)
def test_what_is_no_list_is_not_an_empty_one(liar: Liar, kind: str) -> None:
    """Fault: a sign-in page is taken for an empty bucket, and a run begins anew over its checkpoints."""
    liar.script = lambda *_: LISTS[kind]
    with pytest.raises(
        UnreachableError, match=f"not an S3 answer from {liar.url}|the server failed .500 InternalError"
    ):
        liar.store.list("checkpoints/" if kind == "other names" else "")


def test_an_empty_list_is_one_and_its_items_are_read(liar: Liar) -> None:
    for items, names in ((b"", []), (ITEM % b"run/a", ["a"])):
        liar.script = lambda *_, items=items: (200, {}, LIST % items)
        assert list(liar.store.list()) == names


PARTS: dict[str, Reply] = {
    "another range": part(512, 611),
    "a shorter range": part(100, 149),
    "no range": part(100, 199, **{"Content-Range": ""}),
    "an odd range": part(100, 199, **{"Content-Range": "bytes */2048"}),
    "the whole": (200, {"ETag": '"e"'}, CONTENT),
    "no length": part(100, 199, **{"Content-Length": ""}),
    "html": (200, {"Content-Type": "text/html"}, HTML),
    "404 in html": (404, {}, HTML),
}


@pytest.mark.parametrize("etag", [None, "e"])
@pytest.mark.parametrize("kind", PARTS)
def test_other_bytes_than_those_asked_for_are_refused(
    liar: Liar, kind: str, etag: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a 206 of another range is taken for the one that was asked for."""
    monkeypatch.setattr(s3, "PATIENCE_S", 0.2)
    liar.script = lambda *_: PARTS[kind]
    with pytest.raises(UnreachableError, match="not an S3 answer from http://127"):
        liar.store.read("a", 100, 100, etag)


@pytest.mark.parametrize("etag", [None, "e"])
@pytest.mark.parametrize("kind", PARTS)
def test_what_a_second_read_heals_is_read_a_second_time(liar: Liar, kind: str, etag: str | None) -> None:
    """Fault: one odd answer in a week of training ends it."""
    answers = iter([PARTS[kind]])
    liar.script = lambda number, method, asked: next(answers, part(*map(int, asked.split("-"))))
    assert liar.store.read("a", 100, 100, etag) == CONTENT[100:200]


@pytest.mark.parametrize("missing", ["ETag", "Content-Length"])
def test_a_head_without_its_headers_is_no_answer(liar: Liar, missing: str) -> None:
    """Fault: KeyError."""
    liar.script = lambda *_: (200, {"ETag": '"e"', missing: ""}, CONTENT)
    with pytest.raises(OddAnswerError, match=f"without .*{missing[:4]}"):
        liar.store.stat("a")


CALLS: dict[str, tuple[object, ...]] = {"list": (), "stat": ("a",), "read": ("a",), "write": ("a", b"")}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("call", CALLS)
def test_a_redirect_names_where_to_go(liar: Liar, status: int, call: str) -> None:
    """Fault: RecursionError."""
    liar.script = lambda *_: (status, {"Location": "https://s3.example/x"}, b"")
    with pytest.raises(ConfigError, match=r"redirects to https://s3\.example/x; set the endpoint URL"):
        getattr(liar.store, call)(*CALLS[call])


@pytest.mark.parametrize("call", CALLS)
def test_headers_that_drip_for_ever_are_broken_off(liar: Liar, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: each read brings something in time, and the reader waits for ever."""
    monkeypatch.setattr(s3, "ANSWER_S", 0.5)
    liar.script = lambda *_: None
    begun = time.monotonic()
    with pytest.raises(UnreachableError, match=r"does not answer \(the answer took longer than 0\.5 s\)"):
        getattr(liar.store, call)(*CALLS[call])
    assert time.monotonic() - begun < 10


def test_a_run_that_has_had_a_checkpoint_does_not_begin_anew(
    liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the store says that it is empty, and the run begins at nimg 0 over its checkpoints."""
    line = b'{"time": 1.0, "attempt": 1, "nimg": 8, "kind": "upload", "seconds": 1.0, "failed": 0.0}\n'
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    mine = Fixture(tmp_path / "new", [], url="s3://bucket/run", endpoint_url=liar.url)
    liar.script = lambda *_: (200, {"ETag": '"e"'}, line)
    assert mine.storage.attempts() == 1
    liar.script = lambda number, method, asked: (200, {"ETag": '"e"'}, LIST % b"" if method == "GET" else b"")
    with pytest.raises(CheckpointError, match="had a checkpoint at nimg 8, and none is found"):
        mine.restore()
    mine.storage.close(1)


def _spoilt(draw: random.Random, reply: Reply) -> Reply:
    """The reply with one or two things wrong, never other content of the right length under the right headers."""
    status, headers, body = reply
    headers = dict(headers)
    for _ in range(draw.randint(1, 2)):
        match draw.randrange(6):
            case 0:
                status = draw.choice(
                    [200, 201, 204, 206, 301, 302, 304, 307, 400, 401, 403, 404, 409, 412, 416, 429, 500, 502, 503]
                )
            case 1:
                headers[draw.choice(["ETag", "Content-Length", "Content-Range", "Content-Type"])] = ""
            case 2:
                headers["Content-Range"] = draw.choice(
                    ["bytes", "bytes 0-9/10", "bytes 9-0/5", "items 1-2/3", "bytes 100-199/*", "x"]
                )
            case 3:
                headers["Content-Length"] = draw.choice(["-1", "x", "1e3", str(10**30), "0", str(len(body) + 7)])
            case 4:
                body = draw.choice(
                    [b"", HTML, b"\0" * 50, b"<a><b></a>", body[: len(body) // 2], body + body, b"{}", body[::-1][:-1]]
                )
            case 5:
                headers["Location"] = draw.choice(["http://127.0.0.1:9/", "//", "/", "https://user:secret@host/"])
    return status, headers, body


@pytest.mark.soak
def test_no_answer_ends_in_a_traceback_a_hang_or_a_wrong_object(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an answer that nobody thought of is taken, or its error is a library's."""
    monkeypatch.setattr(s3, "PATIENCE_S", 0.2)
    monkeypatch.setattr(s3, "ANSWER_S", 3.0)
    monkeypatch.setattr(s3, "READ_S", 1)
    store = S3Store("bucket", "run", liar.url, ("key", "secret"), attempts=1)
    honest: dict[str, Reply] = {
        "list": (200, {}, LIST % (ITEM % b"run/a")),
        "stat": (200, {"ETag": '"e"'}, b"123"),
        "read": part(100, 199),
        "write": (200, {"ETag": '"e"'}, b""),
    }
    right: dict[str, object] = {"list": ["a"], "stat": 3, "read": CONTENT[100:200], "write": None}
    taken = dict.fromkeys(honest, 0)
    for seed in range(1500):
        draw = random.Random(seed)
        call = draw.choice([*honest])
        reply = _spoilt(draw, honest[call])
        liar.script = lambda *_, reply=reply: reply
        begun, result, failure = time.monotonic(), None, ""
        try:
            if call == "read":
                result = store.read("a", 100, 100, draw.choice([None, "e"]))
            else:
                result = getattr(store, call)(*CALLS[call])
        except WarmDistError as error:
            failure = str(error)
        else:
            taken[call] += 1
            seen = [*result] if call == "list" else result.size if call == "stat" else result
            lengths = {
                "stat": {0, 3, len(reply[2]), *map(int, filter(str.isdecimal, [reply[1].get("Content-Length", "")]))}
            }
            assert seen == right[call] or seen in lengths.get(call, ()), (seed, reply)
        assert "secret" not in failure, reply
        assert time.monotonic() - begun < 20, (seed, reply)
    assert min(taken.values()) > 0
