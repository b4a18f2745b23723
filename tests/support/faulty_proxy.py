"""A loopback HTTP proxy in front of the embedded S3 that does to answers what networks do; it counts what it did.

The client's own Host header travels on, so its signatures stay valid.
"""

from __future__ import annotations

import hashlib
import http.client
import http.server
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

FAULTS = ("slow_down", "reset", "truncated", "throttled", "stalled", "flipped")
Plan = Callable[[str, str, int], str | None]
"""Path, Range header, and how often these two were asked for before → the fault, or None."""


def share(seed: int, probability: float, faults: tuple[str, ...]) -> Plan:
    """Each request for itself, equally likely; a pure function of the request, whatever the threads' order."""

    def plan(path: str, asked: str, before: int) -> str | None:
        digest = hashlib.sha256(f"{seed} {path} {asked} {before}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big")
        return faults[draw // 1000 % len(faults)] if draw % 1000 < 1000 * probability else None

    return plan


class FaultyProxy:
    """`with FaultyProxy(s3.endpoint_url) as proxy:`; set `plan` at any time. It concerns GETs of .tar objects.

    expired: an access key that is refused. silent: once set, nothing is answered any more. counts: faults done, by name. requests: GETs of .tar objects seen. stall_s: silence in mid-body, after which the
    connection closes. throttle: bytes a second.
    """

    def __init__(self, upstream: str, stall_s: float = 30.0, throttle: int = 1_000_000) -> None:
        self.host, self.port = urlsplit(upstream).hostname, urlsplit(upstream).port
        self.stall_s, self.throttle = stall_s, throttle
        self.plan: Plan = lambda path, asked, before: None
        self.expired: str | None = None
        self.counts: Counter[str] = Counter()
        self.requests = 0
        self.closing, self.silent = threading.Event(), threading.Event()
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> FaultyProxy:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, path: str, asked: str) -> str | None:
        with self._lock:
            self.requests += 1
            name = self.plan(path, asked, self._seen[path, asked])
            self._seen[path, asked] += 1
            if name is not None:
                self.counts[name] += 1
        return name


class _Handler(http.server.BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"
    timeout = 60

    def _forward(self) -> None:
        proxy, path = self.proxy, self.path.partition("?")[0]
        if proxy.expired and proxy.expired in f"{self.path} {self.headers['Authorization']}":
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self._answer(403, [], b"<Error><Code>InvalidAccessKeyId</Code><Message>unknown key</Message></Error>")
            return
        if proxy.silent.is_set():
            proxy.closing.wait()
            self.close_connection = True
            return
        concerned = self.command == "GET" and path.endswith(".tar")
        fault = proxy.fault(path, self.headers["Range"] or "") if concerned else None
        if fault == "slow_down":
            self._answer(503, [], b"<Error><Code>SlowDown</Code><Message>Please reduce it</Message></Error>")
            return
        upstream = http.client.HTTPConnection(proxy.host, proxy.port, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(self.rfile.read(int(self.headers["Content-Length"] or 0)))
            answer = upstream.getresponse()
            body = answer.read()
            headers = [pair for pair in answer.getheaders() if pair[0].lower() not in _HOP_BY_HOP]
        finally:
            upstream.close()
        self._answer(answer.status, headers, body, fault)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self._send(body, fault)
        except OSError:  # the client has left
            self.close_connection = True

    def _send(self, body: bytes, fault: str | None) -> None:
        half = len(body) // 2
        if fault == "flipped":
            body = body[:half] + bytes(byte ^ 255 for byte in body[half : half + 16]) + body[half + 16 :]
        if fault == "throttled":
            step = 16 << 10
            for start in range(0, len(body), step):
                self.proxy.closing.wait(step / self.proxy.throttle)
                self.wfile.write(body[start : start + step])
        elif fault in ("reset", "truncated", "stalled"):
            self.wfile.write(body[:half])
            self.close_connection = True
            if fault == "reset":  # no linger: the kernel answers with RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            elif fault == "stalled":
                self.proxy.closing.wait(self.proxy.stall_s)
        else:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "date"}
