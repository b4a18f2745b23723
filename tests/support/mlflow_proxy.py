"""A port in front of a server."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time


class Proxy:
    """A port in front of the server: slow, closed, or losing replies after the request has arrived."""

    def __init__(self, url: str, delay_s: float = 0.0) -> None:
        self.target = int(url.rpartition(":")[2])
        self.delay_s = delay_s  # of each request
        self.loses_replies_to = b"never"
        self.requests = 0
        self.open: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._forward, args=(self.listener.accept()[0],), daemon=True).start()

    def _forward(self, near: socket.socket) -> None:
        far = socket.create_connection(("127.0.0.1", self.target))
        self.open.append(near)
        doomed = threading.Event()

        def replies() -> None:
            with contextlib.suppress(OSError):
                while part := far.recv(1 << 20):
                    if doomed.is_set():
                        break
                    near.sendall(part)
                near.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=replies, daemon=True).start()
        with contextlib.suppress(OSError), far:
            while part := near.recv(1 << 20):
                if re.match(rb"[A-Z]+ /", part):
                    self.requests += 1
                    time.sleep(self.delay_s)
                if self.loses_replies_to in part:
                    doomed.set()
                far.sendall(part)

    def close(self) -> None:
        for sock in [self.listener, *self.open]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
