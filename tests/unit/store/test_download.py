"""Downloads: checked before use, kept by their hash, and one class of error for each way to fail."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.memory_store import MemoryStore
from warm_dist.errors import AccessError, ConfigError, DataError, UnreachableError
from warm_dist.files import file_sha256
from warm_dist.store.download import fetch

CONTENT = bytes(range(256)) * 9000  # more than two blocks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


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


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[MemoryStore], MemoryStore]:
    """Let downloads find this store in the place of every S3."""

    def use(store: MemoryStore) -> MemoryStore:
        monkeypatch.setattr("warm_dist.store.download.open_store", store.open)
        return store

    return use


def test_an_s3_object_is_fetched_once(serve: Callable[[MemoryStore], MemoryStore], tmp_path: Path) -> None:
    store = serve(MemoryStore({"weights.pt": CONTENT, "bad.pt": CONTENT[:-1]}))
    for _ in range(2):
        path = fetch("s3://bucket/weights/weights.pt", SHA256, tmp_path)
    assert path == tmp_path / SHA256 / "weights.pt"
    assert path.read_bytes() == CONTENT
    assert store.opened == ["s3://bucket/weights"]
    assert store.downloads == 1
    with pytest.raises(DataError, match="nothing of it was loaded"):
        fetch("s3://bucket/weights/bad.pt", SHA256, tmp_path)
    assert files(tmp_path) == [path]


def test_what_s3_refuses_keeps_its_class_but_a_missing_object(
    serve: Callable[[MemoryStore], MemoryStore], tmp_path: Path
) -> None:
    serve(MemoryStore({"gone.pt.old": b""}))
    with pytest.raises(ConfigError, match=r"eval.extractor_url s3://bucket/gone.pt: no such object"):
        fetch("s3://bucket/gone.pt", SHA256, tmp_path)
    for kind in (DataError, AccessError, UnreachableError):
        serve(MemoryStore({"a.pt": b""}, kind("as it was")))
        with pytest.raises(kind, match="as it was"):
            fetch("s3://bucket/a.pt", SHA256, tmp_path)
    with pytest.raises(ConfigError, match="needs s3://bucket/key"):
        fetch("s3://bucket", SHA256, tmp_path)
    assert files(tmp_path) == []
