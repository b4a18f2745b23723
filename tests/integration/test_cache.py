"""The cache of a node, shared by processes and over a real S3: one fetch, one limit, no wrong page after kill -9."""

from __future__ import annotations

import os
import signal
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_pipelines.reading.loader import open_loader
from tests.support.caches import SIZE, Counting, cached, content, pages
from tests.support.reading import config, equal, take
from tests.support.zygote import Forked, zygote
from warm_dist.store.cache import PAGE_BYTES, CachedStore
from warm_dist.store.open import open_store
from warm_dist.store.s3 import S3Store

if TYPE_CHECKING:
    from tests.support.packed import Packed


@pytest.fixture
def base(tmp_path: Path) -> Counting:
    store = Counting(tmp_path / "base")
    for name in "abcd":
        store.write(name, content(name))
    return store


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


READER = """
import hashlib, random, sys
from pathlib import Path
from warm_dist.store.cache import CachedStore
from warm_dist.store.folder import FolderStore
base, limit, seed = FolderStore(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
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


def readers(base: Counting, limit: int, seeds: range, count: int) -> list[Forked]:
    return [zygote().start("-c", READER, *map(str, (base.root, limit, seed, count))) for seed in seeds]


def wrong_pages(store: CachedStore) -> list[str]:
    """Pages that are not what the base has."""
    right = {}
    for path, stat in store.base.list().items():
        data, home = store.base.read(path), store._home(path, stat.etag)
        for page in range(-(-len(data) // PAGE_BYTES)):
            right[home / str(page)] = data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
    found = pages(store.folder)
    return [str(path) for path in found if path.read_bytes() != right[path]]


def test_processes_share_what_each_has_read(base: Counting) -> None:
    store = cached(base)
    processes = readers(base, 1 << 30, range(3), 100)
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert not wrong_pages(store)
    assert len(pages(store.folder)) == 4 * 4
    (last,) = readers(base, 1 << 30, range(9, 10), 100)
    assert last.communicate()[0].split() == ["ready", "0"]


def test_processes_share_the_limit(base: Counting) -> None:
    """Measured while three of them write, and make room out of another data set's four pages."""
    limit = 6 * PAGE_BYTES
    store = cached(base, limit)
    foreign = store.folder / "foreign.pages"
    foreign.mkdir()
    for page in range(4):
        (foreign / str(page)).write_bytes(bytes(PAGE_BYTES))
    (store.folder / "warm-dist.account").write_text(str(4 * PAGE_BYTES))
    processes = readers(base, limit, range(3), 100)
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
from warm_dist.store.cache import CachedStore
from warm_dist.store.folder import FolderStore
base = FolderStore(Path(sys.argv[1]))
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


@pytest.mark.parametrize("moment", ["half", "whole", "renamed"])
def test_kill_9_leaves_no_wrong_page_and_no_wrong_account(base: Counting, moment: str) -> None:
    limit = 5 * PAGE_BYTES
    assert zygote().run("-c", KILLED, base.root, limit, 2, moment).returncode == -signal.SIGKILL
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
