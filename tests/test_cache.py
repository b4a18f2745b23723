"""The cache of a node: what is read twice is fetched once, never wrong, never too much, and never in the way."""

from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_pipelines.pack import pack
from data_pipelines.reading.loader import open_loader
from data_pipelines.sources.open import open_source
from tests.processes import ROOT
from tests.test_loader import config, equal, loader, take
from warm_dist.errors import DataError, OutputError
from warm_dist.store.cache import CachedStore, PAGE_BYTES
from warm_dist.store.folder import FolderStore
from warm_dist.store.open import open_store
from warm_dist.store.s3 import S3Store

if TYPE_CHECKING:
    from conftest import Packed

SIZE = 3 * PAGE_BYTES + PAGE_BYTES // 2


class Counting(FolderStore):
    """Remembers its GETs."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gets: list[tuple[str, int, int]] = []

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        self.gets.append((path, start, length or 0))
        return super().read(path, start, length, etag)


def content(name: str, size: int = SIZE) -> bytes:
    return random.Random(name).randbytes(size)


def pages(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name.isdigit()]


@pytest.fixture
def base(tmp_path: Path) -> Counting:
    store = Counting(tmp_path / "base")
    for name in "abcd":
        store.write(name, content(name))
    return store


def cached(base: FolderStore, limit_bytes: int = 1 << 30, folder: str = "cache") -> CachedStore:
    store = CachedStore(base, base.root.parent / folder, limit_bytes)
    store.list()
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


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    folder = tmp_path_factory.mktemp("digits")
    return pack(open_source("digits", 8), str(folder), shard_size=500), folder


def test_a_damaged_page_is_a_data_error_once_and_then_healed(local, tmp_path: Path) -> None:
    manifest, folder = local
    store = CachedStore(FolderStore(folder), tmp_path / "cache", 1 << 30)
    row = 1100
    with closing(loader(manifest, store)) as reader:
        right = reader.read(np.arange(1000, 1200))
        home = store._home(manifest.shards[2].name, store.stat(manifest.shards[2].name).etag)
        place = int(manifest.offset[row] + manifest.length[row] - 1)
        page = home / str(place // PAGE_BYTES)
        data = bytearray(page.read_bytes())
        data[place % PAGE_BYTES] ^= 255
        page.write_bytes(data)
        words = f"image '{manifest.key[row]}' in shard .*: its crc32 .*; its cached copy is dropped, run the same"
        with pytest.raises(DataError, match=words):
            reader.read(np.array([row]))
        assert np.array_equal(reader.read(np.arange(1000, 1200)), right)


def test_the_second_epoch_makes_no_requests_and_batches_are_the_same(
    digits: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(digits, cache_dir=str(tmp_path / "cache"))
    plain = take(digits.manifest, open_store(digits.url, digits.endpoint_url), 0, 3 * 57)
    with closing(open_loader(settings, 0, 1)) as reader:
        assert isinstance(reader.store, CachedStore)
        base = reader.store.base
        assert isinstance(base, S3Store)
        requests: list[object] = []
        get = base._get
        monkeypatch.setattr(base, "_get", lambda *place: requests.append(place) or get(*place))
        size = reader.batch_size
        first = list(islice(reader.batches(0), -(-2 * 1797 // size)))  # one epoch, and all that is read ahead
        assert requests
        requests.clear()
        again = list(islice(reader.batches(0), len(first)))
        assert not requests
    keys = [key for batch in plain for key in batch.keys]
    for batches in (first, again):
        assert [key for batch in batches for key in batch.keys] == keys[: len(first) * size]
    assert all(equal(one, other) for one, other in zip(first, again, strict=True))
    pixels = np.concatenate([batch.images for batch in plain])
    assert np.array_equal(np.concatenate([batch.images for batch in first]), pixels[: len(first) * size])


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


READER = """
import hashlib, random, sys
from pathlib import Path
from data_pipelines.cache import CachedStore
from data_pipelines.store import FileStore
base, limit, seed = FileStore(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
gets = []
read = base.read
base.read = lambda *args: gets.append(args) or read(*args)
store = CachedStore(base, Path(sys.argv[1]).parent / "cache", limit)
files = {path: stat for path, stat in store.list().items()}
whole = {path: read(path) for path in files}
draw = random.Random(seed)
print("ready", flush=True)
for _ in range(int(sys.argv[4])):
    path = draw.choice(sorted(files))
    start, end = sorted(draw.sample(range(files[path].size + 1), 2))
    assert store.read(path, start, end - start, files[path].etag) == whole[path][start:end]
print(len(gets))
"""


def readers(base: Counting, limit: int, seeds: range, count: int) -> Iterator[subprocess.Popen[str]]:
    for seed in seeds:
        command = [sys.executable, "-c", READER, str(base.root), str(limit), str(seed), str(count)]
        yield subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wrong_pages(store: CachedStore) -> list[str]:
    """Pages that are not what the base has."""
    right = {}
    for path, stat in store.base.list().items():
        data, home = store.base.read(path), store._home(path, stat.etag)
        for page in range(-(-len(data) // PAGE_BYTES)):
            right[home / str(page)] = data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
    found = pages(store.folder)
    return [str(path) for path in found if path.read_bytes() != right[path]]


@pytest.mark.slow
def test_processes_share_what_each_has_read(base: Counting) -> None:
    store = cached(base)
    processes = list(readers(base, 1 << 30, range(3), 100))
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert not wrong_pages(store)
    assert len(pages(store.folder)) == 4 * 4
    (last,) = readers(base, 1 << 30, range(9, 10), 100)
    assert last.communicate()[0].split() == ["ready", "0"]


@pytest.mark.slow
def test_processes_share_the_limit(base: Counting) -> None:
    """Measured while three of them write, and make room out of another data set's four pages."""
    limit = 6 * PAGE_BYTES
    store = cached(base, limit)
    foreign = store.folder / "foreign.pages"
    foreign.mkdir()
    for page in range(4):
        (foreign / str(page)).write_bytes(bytes(PAGE_BYTES))
    (store.folder / "warm-dist.account").write_text(str(4 * PAGE_BYTES))
    processes = list(readers(base, limit, range(3), 100))
    most = 0
    while any(process.poll() is None for process in processes):
        with suppress(FileNotFoundError):  # a page just dropped, or a name just changed
            files = [Path(folder) / name for folder, _, names in os.walk(store.folder) for name in names]
            most = max(most, sum(path.stat().st_size for path in files if path.parent.suffix == ".pages"))
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert not foreign.exists()
    assert limit - PAGE_BYTES < most <= limit
    assert not wrong_pages(store)


KILLED = """
import os, signal, sys
from pathlib import Path
whole, rename = Path.write_bytes, Path.replace
from data_pipelines.cache import CachedStore
from data_pipelines.store import FileStore
base = FileStore(Path(sys.argv[1]))
store = CachedStore(base, Path(sys.argv[1]).parent / "cache", int(sys.argv[2]))
left, moment = int(sys.argv[3]), sys.argv[4]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def write_bytes(self, data):
    global left
    left -= 1
    if left == 0 and moment == "half":
        whole(self, bytes(data)[: len(data) // 2])
        die()
    whole(self, data)
    if left == 0 and moment == "whole":
        die()
def replace(self, target):
    rename(self, target)
    if left == 0:
        die()
Path.write_bytes, Path.replace = write_bytes, replace
store.read("a", 0, store.list()["a"].size, store.list()["a"].etag)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half", "whole", "renamed"])
def test_kill_9_leaves_no_wrong_page_and_no_wrong_account(base: Counting, moment: str) -> None:
    limit = 5 * PAGE_BYTES
    command = [sys.executable, "-c", KILLED, str(base.root), str(limit), "2", moment]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    store = cached(base, limit)
    assert not wrong_pages(store)
    assert len(pages(store.folder)) == (2 if moment == "renamed" else 1)
    assert int((store.folder / "warm-dist.account").read_text()) >= sum(
        path.stat().st_size for path in pages(store.folder)
    )
    for name in "abcd":  # goes on, fills up, and keeps the limit with whatever was left behind
        assert store.read(name, 0, SIZE, base.stat(name).etag) == content(name)
    files = [path for path in store.folder.glob("*/*") if path.is_file()]
    assert 4 * PAGE_BYTES < sum(path.stat().st_size for path in files) <= limit
    assert not wrong_pages(store)
