"""The cache of a node: what is read twice is fetched once, never wrong, never too much, and never in the way."""

from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import os
import random
import warnings
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.support.caches import SIZE, Counting, cached, content, pages
from tests.support.packed import Packed
from tests.support.reading import loader
from warm_dist.errors import DataError, OutputError
from warm_dist.store.cache import PAGE_BYTES, CachedStore
from warm_dist.store.folder import FolderStore


@pytest.fixture
def base(tmp_path: Path) -> Counting:
    store = Counting(tmp_path / "base")
    for name in "abcd":
        store.write(name, content(name))
    return store


@pytest.mark.parametrize("seed", range(4))
def test_any_range_is_what_the_base_has_and_is_fetched_once(base: Counting, seed: int) -> None:
    """Random ranges in random order: every mixture of pages that are here and pages that are not."""
    store, draw, etag = cached(base), random.Random(seed), base.stat("a").etag
    expected = content("a")
    spans = [sorted(draw.sample(range(SIZE + 1), 2)) for _ in range(40)]
    spans += [[0, SIZE], [SIZE - 1, SIZE], [PAGE_BYTES, 2 * PAGE_BYTES], [PAGE_BYTES - 1, PAGE_BYTES + 1]]
    for start, end in spans:
        assert store.read("a", start, end - start, etag) == expected[start:end]
    fetched = sorted((start, start + length) for _, start, length in base.gets)
    assert fetched[0][0] == 0
    assert fetched[-1][1] == SIZE
    assert all(end == start for (_, end), (start, _) in pairwise(fetched))  # no byte twice
    assert all(start % PAGE_BYTES == 0 for start, _ in fetched)


def test_neighbouring_missing_pages_are_one_get(base: Counting) -> None:
    store, etag = cached(base), base.stat("a").etag
    store.read("a", PAGE_BYTES + 5, 10, etag)
    base.gets.clear()
    store.read("a", 0, SIZE, etag)
    assert base.gets == [("a", 0, PAGE_BYTES), ("a", 2 * PAGE_BYTES, SIZE - 2 * PAGE_BYTES)]


def test_only_known_versions_are_kept_and_another_version_has_its_own_pages(base: Counting) -> None:
    store = cached(base)
    store.read("a")
    store.read("a", 5, 10)
    assert pages(store.folder) == []
    old = base.stat("a").etag
    assert store.read("a", 0, 10, old) == content("a")[:10]
    base.write("a", content("other", SIZE - 500))
    assert store.read("a", 0, 10, old) == content("a")[:10]  # what is here was read before the object was replaced
    with pytest.raises(DataError, match="a: was replaced"):
        store.read("a", PAGE_BYTES, 10, old)
    new = store.stat("a").etag
    assert store.read("a", 0, 10, new) == content("other", SIZE - 500)[:10]
    with pytest.raises(DataError, match=r"a: bytes .* were asked for, it ends at"):
        store.read("a", SIZE - 510, 100, new)
    assert len(pages(store.folder)) == 2


def test_the_limit_holds_and_what_is_there_stays(base: Counting) -> None:
    limit = 4 * PAGE_BYTES + 10
    store = cached(base, limit)
    etags = {name: base.stat(name).etag for name in "abcd"}
    for _ in range(3):
        for name in "abcd":
            assert store.read(name, 0, SIZE, etags[name]) == content(name)
            assert sum(path.stat().st_size for path in pages(store.folder)) <= limit
    base.gets.clear()
    for name in "abcd":
        store.read(name, 0, SIZE, etags[name])
    # in rounds, least-recently-used would be hit never; four of sixteen pages are here
    assert sum(length for *_, length in base.gets) <= 4 * SIZE - 3 * PAGE_BYTES


def test_versions_that_the_data_set_does_not_have_make_room(base: Counting) -> None:
    limit = SIZE + 2 * PAGE_BYTES
    store = cached(base, limit)
    for name in "ab":
        store.read(name, 0, SIZE if name == "a" else PAGE_BYTES, base.stat(name).etag)
    newer = store.folder / "0.pages"  # a third, newer than both
    newer.mkdir()
    (newer / "0").write_bytes(b"")
    os.utime(newer, (2e9, 2e9))
    (store.folder / "mine").mkdir()  # the folder may hold anything else
    (store.folder / "mine" / "1").write_bytes(bytes(2 * SIZE))
    base.write("a", content("new"))  # its pages are nobody's now; b's stay
    again = cached(base, limit)
    again.read("a", 0, SIZE, base.stat("a").etag)
    base.gets.clear()
    assert again.read("a", 0, SIZE, base.stat("a").etag) == content("new")
    again.read("b", 0, PAGE_BYTES, base.stat("b").etag)
    assert base.gets == []
    assert (newer / "0").exists()  # no more than needed is dropped, the oldest first
    assert (store.folder / "mine" / "1").exists()


def test_a_lowered_limit_and_a_lost_account(base: Counting) -> None:
    """Fault: an empty or damaged account counts as no bytes, so that the cache outgrows its limit."""
    store = cached(base)
    for name in "abcd":
        store.read(name, 0, SIZE, base.stat(name).etag)
    base.write("e", content("e"))
    limit = 2 * SIZE + 10
    for text in ("", "\0\0\0"):
        (store.folder / "warm-dist.account").write_text(text)
        assert cached(base, limit).read("e", 0, SIZE, base.stat("e").etag) == content("e")
        assert SIZE < sum(path.stat().st_size for path in pages(store.folder)) <= limit
        limit -= PAGE_BYTES


def test_a_folder_that_cannot_be_written_is_an_error_at_start(base: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    (base.root.parent / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file: cannot be written \(.*\); set data\.cache_dir"):
        cached(base, folder="file")

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        cached(base, folder="full")


def test_a_disk_that_fills_up_later_ends_the_keeping_with_one_warning(
    base: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, etag, whole = cached(base), base.stat("a").etag, Path.write_bytes
    store.read("a", 0, 10, etag)

    def full(self: Path, data: bytes) -> int:
        whole(self, bytes(data[:100]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert store.read("a", 0, SIZE, etag) == content("a")
    assert [str(item.message) for item in seen] == [f"{store.folder}: nothing more is cached (No space left on device)"]
    assert [path.name for path in pages(store.folder)] == ["0"]
    assert not list(store.folder.rglob("*.partial"))
    base.gets.clear()
    assert store.read("a", 0, 10, etag) == content("a")[:10]
    assert base.gets == []  # what is here is still of use


def test_a_page_of_a_wrong_length_is_fetched_again(base: Counting) -> None:
    """A power cut may keep a name and lose its content."""
    store, etag = cached(base), base.stat("a").etag
    store.read("a", 0, SIZE, etag)
    pages(store.folder)[0].write_bytes(b"")
    assert store.read("a", 0, SIZE, etag) == content("a")
    base.gets.clear()
    assert store.read("a", 0, SIZE, etag) == content("a")
    assert base.gets == []


@pytest.mark.parametrize("damage", ["a bit", "zeros"])
def test_a_damaged_page_is_dropped_and_fetched_again(
    digits: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Fault: a page of zeros, as a power cut leaves them, ends every run with code 3."""
    manifest, folder = digits.manifest, Path(digits.url)
    store = CachedStore(FolderStore(folder), tmp_path / "cache", 1 << 30)
    row = 1100
    with closing(loader(manifest, store)) as reader:
        right = reader.read(np.arange(1000, 1200))
        home = store._home(manifest.shards[2].name, store.stat(manifest.shards[2].name).etag)
        place = int(manifest.offset[row] + manifest.length[row] - 1)
        page = home / str(place // PAGE_BYTES)
        good = page.read_bytes()
        data = bytearray(good if damage == "a bit" else len(good))
        data[place % PAGE_BYTES] ^= 255
        page.write_bytes(data)
        assert np.array_equal(reader.read(np.array([row])), right[100:101])
        assert page.read_bytes() == good
        assert f"image '{manifest.key[row]}' in shard" in (told := capsys.readouterr().err)
        assert told.count("its cached copy is damaged; read again") == 1
        assert np.array_equal(reader.read(np.arange(1000, 1200)), right)
        assert capsys.readouterr().err == ""


def test_a_damaged_object_is_read_twice_and_then_named(digits: Packed, tmp_path: Path) -> None:
    """Fault: an image that is damaged in the store itself is fetched again for ever, or taken."""
    manifest, row = digits.manifest, 1100
    shard = manifest.shards[2].name
    for path in Path(digits.url).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()) if path.is_file() else None
    data = bytearray((tmp_path / shard).read_bytes())
    data[int(manifest.offset[row]) + 5] ^= 1
    (tmp_path / shard).write_bytes(data)
    words = r"its crc32 is not the manifest's; if `python -m data_pipelines\.verify`"
    store = CachedStore(FolderStore(tmp_path), tmp_path / "cache", 1 << 30)
    with closing(loader(manifest, store)) as reader, pytest.raises(DataError, match=words):
        reader.read(np.array([row]))


def test_one_writes_at_a_time_and_readers_do_not_wait(base: Counting) -> None:
    store, etag = cached(base), base.stat("a").etag
    store.read("a", 0, 10, etag)
    with (store.folder / "warm-dist.account").open("r+") as account, concurrent.futures.ThreadPoolExecutor() as pool:
        fcntl.flock(account, fcntl.LOCK_EX)  # another process is writing
        assert store.read("a", 0, 20, etag) == content("a")[:20]
        writing = pool.submit(store.read, "a", 0, SIZE, etag)
        with pytest.raises(concurrent.futures.TimeoutError):  # 3.10: not yet the builtin one
            writing.result(0.3)
        assert len(pages(store.folder)) == 1
        fcntl.flock(account, fcntl.LOCK_UN)
        assert writing.result(30) == content("a")
    assert len(pages(store.folder)) == 4
