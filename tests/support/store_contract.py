"""What holds for every store; a test class inherits it and has a fixture `store`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from warm_dist.errors import DataError
from warm_dist.store import base as store_module
from warm_dist.store.base import Store


class StoreContract:
    def test_write_read_list_stat_delete(self, store: Store) -> None:
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

    def test_a_conditional_write_is_of_the_version_that_was_seen(self, store: Store) -> None:
        """Fault: of two who take one place at once both believe to have it."""
        first = store.write_if("o.json", b"1", None)
        assert first == store.stat("o.json").etag
        assert store.write_if("o.json", b"2", None) is None
        second = store.write_if("o.json", b"3", first)
        assert second == store.stat("o.json").etag != first
        assert store.write_if("o.json", b"4", first) is None
        assert store.read("o.json") == b"3"
        assert store.write_if("none.json", b"5", first) is None
        assert list(store.list()) == ["o.json"]

    def test_upload_and_download_of_a_file_in_several_parts(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = os.urandom(9 << 20)  # boto3 sends 8 MiB a part
        (tmp_path / "local").write_bytes(data)
        store.upload("big.bin", tmp_path / "local")
        monkeypatch.setattr(store_module, "PIECE_BYTES", 2_000_000)
        store.download("big.bin", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == data

    def test_missing_short_and_replaced_objects(self, store: Store) -> None:
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
