"""A folder as a store."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.support.store_contract import StoreContract
from warm_dist.errors import DataError, OutputError
from warm_dist.store.base import Store
from warm_dist.store.open import open_store

BINARIES = re.compile(r"(a/)?\w+\.bin")


class TestFolder(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store(str(tmp_path / "out"))


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


def test_a_file_that_was_written_over_in_place_is_another_version(tmp_path: Path) -> None:
    """Its inode and length stay: only the time tells."""
    store, path = open_store(str(tmp_path)), tmp_path / "a.bin"
    path.write_bytes(b"old")
    before = store.stat("a.bin").etag
    path.write_bytes(b"new")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert store.stat("a.bin").etag != before
    with pytest.raises(DataError, match="was replaced"):
        store.read("a.bin", etag=before)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Fault: a NotADirectoryError in place of OutputError, and so another exit code."""
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


def test_deleting_the_last_file_removes_its_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a/b/c.bin", b"1")
    store.delete("a/b/c.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_file_rewritten_in_place_with_as_many_bytes_is_another_version(tmp_path: Path) -> None:
    """Fault: a tag without the time, so that other bytes are read as the pinned ones."""
    store = open_store(str(tmp_path))
    store.write("a.bin", b"old")
    tag = store.stat("a.bin").etag
    os.utime(tmp_path / "a.bin", ns=(0, 1))  # as a write in place does: the same inode and size
    with pytest.raises(DataError, match="was replaced"):
        store.read("a.bin", etag=tag)
