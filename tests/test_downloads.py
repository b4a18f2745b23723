"""Downloads: checked before use, kept by their hash, and one class of error for each way to fail."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from warm_dist.errors import AccessError, ConfigError, DataError, OutputError, UnreachableError
from warm_dist.files import file_sha256
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


class MemoryStore:
    """Of S3, what `fetch` needs."""

    def __init__(self, objects: dict[str, bytes], refusal: Exception | None = None) -> None:
        self.objects, self.refusal, self.opened, self.downloads = objects, refusal, [], 0

    def open(self, url: str) -> Any:
        self.opened.append(url)
        return self

    def download(self, path: str, local_file: Path) -> None:
        self.downloads += 1
        if path not in self.objects:
            raise DataError(f"s3://bucket/weights/{path}: does not exist")
        if self.refusal:
            raise self.refusal
        local_file.write_bytes(self.objects[path])

    def list(self, prefix: str = "") -> Mapping[str, Any]:
        return {path: len(data) for path, data in self.objects.items() if path.startswith(prefix)}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_path_is_checked_and_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(CONTENT)
    assert file_sha256(path) == SHA256
    assert fetch(str(path), SHA256, tmp_path / "cache") == path
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match=f"sha256 {SHA256}, eval.extractor_sha256 says {'0' * 64}; nothing of it was"):
        fetch(str(path), "0" * 64)
    with pytest.raises(ConfigError, match=r"eval.extractor_url .*gone.pt: no such file"):
        fetch(str(tmp_path / "gone.pt"), SHA256)
    with pytest.raises(ConfigError, match=r"^other.url "):
        fetch(str(tmp_path / "gone.pt"), SHA256, key="other.url")


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


def test_an_s3_object_is_fetched_once(tmp_path: Path) -> None:
    store = MemoryStore({"weights.pt": CONTENT, "bad.pt": CONTENT[:-1]})
    for _ in range(2):
        path = fetch("s3://bucket/weights/weights.pt", SHA256, tmp_path, store.open)
    assert path == tmp_path / SHA256 / "weights.pt"
    assert path.read_bytes() == CONTENT
    assert store.opened == ["s3://bucket/weights"]
    assert store.downloads == 1
    with pytest.raises(DataError, match="nothing of it was loaded"):
        fetch("s3://bucket/weights/bad.pt", SHA256, tmp_path, store.open)
    assert files(tmp_path) == [path]


def test_what_s3_refuses_keeps_its_class_but_a_missing_object(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval.extractor_url s3://bucket/gone.pt: no such object"):
        fetch("s3://bucket/gone.pt", SHA256, tmp_path, MemoryStore({"gone.pt.old": b""}).open)
    for kind in (DataError, AccessError, UnreachableError):
        with pytest.raises(kind, match="as it was"):
            fetch("s3://bucket/a.pt", SHA256, tmp_path, MemoryStore({"a.pt": b""}, kind("as it was")).open)
    with pytest.raises(ConfigError, match="a command that reads S3"):
        fetch("s3://bucket/a.pt", SHA256, tmp_path)
    with pytest.raises(ConfigError, match="needs s3://bucket/key"):
        fetch("s3://bucket", SHA256, tmp_path, MemoryStore({}).open)
    assert files(tmp_path) == []
