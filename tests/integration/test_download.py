"""Downloads from a web server: kept by their hash, and one class of error for each way to fail."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from warm_dist.errors import ConfigError, DataError, OutputError, UnreachableError
from warm_dist.store.download import fetch

CONTENT = bytes(range(256)) * 9000  # more than two blocks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        if self.path == "/broken.pt":
            self.send_error(503)
        elif self.path == "/short.pt":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"only this")
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server of the folder that it also yields."""
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder))
    ) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", folder
        httpd.shutdown()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_web_file_is_fetched_once(server: tuple[str, Path], tmp_path: Path) -> None:
    (url, served), cache = server, tmp_path / "cache"
    (served / "weights.pt").write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match="nothing of it was loaded"):
        fetch(f"{url}/weights.pt", SHA256, cache)
    assert files(cache) == [], "a bad download is not kept"
    (served / "weights.pt").write_bytes(CONTENT)
    path = fetch(f"{url}/weights.pt?version=2", SHA256, cache)
    assert files(cache) == [path] == [cache / SHA256 / "weights.pt"]
    assert path.read_bytes() == CONTENT
    (served / "weights.pt").unlink()
    assert fetch(f"{url}/weights.pt", SHA256, cache) == path, "the second time it comes from the cache"
    path.write_bytes(b"spoilt")
    with pytest.raises(ConfigError, match="404"):
        fetch(f"{url}/weights.pt", SHA256, cache)


def test_a_server_that_does_not_deliver(server: tuple[str, Path], tmp_path: Path) -> None:
    """Fault: a server's failure reported as a mistake in the config, or half a file kept in the cache."""
    url, cache = server[0], tmp_path / "cache"
    with pytest.raises(UnreachableError, match="503"):
        fetch(f"{url}/broken.pt", SHA256, cache)
    with pytest.raises(UnreachableError, match="the body ended 991 bytes early"):
        fetch(f"{url}/short.pt", SHA256, cache)
    with pytest.raises(UnreachableError, match="refused"):
        fetch("http://127.0.0.1:9/weights.pt", SHA256, cache)
    assert files(cache) == []


def test_the_cache_is_the_users_and_must_be_writable(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: XDG_CACHE_HOME ignored, or a traceback where the cache cannot be written."""
    url, served = server
    (served / "weights.pt").write_bytes(CONTENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch(f"{url}/weights.pt", SHA256) == tmp_path / "xdg" / "warm-dist" / SHA256 / "weights.pt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetch(f"{url}/weights.pt", SHA256) == tmp_path / "home" / ".cache" / "warm-dist" / SHA256 / "weights.pt"
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(OutputError, match="XDG_CACHE_HOME"):
        fetch(f"{url}/weights.pt", SHA256, tmp_path / "taken")


def test_two_at_once_get_the_same_file(server: tuple[str, Path], tmp_path: Path) -> None:
    url, served = server
    (served / "weights.pt").write_bytes(CONTENT)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(f"{url}/weights.pt", SHA256, tmp_path / "cache")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "cache" / SHA256 / "weights.pt"] * 4
    assert files(tmp_path / "cache") == found[:1]
