"""Reading over a bad network: what can be survived costs no image and doubles none, what cannot is named."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from tests.support.faulty_proxy import FAULTS, FaultyProxy, share
from tests.support.reading import equal, joined, loader, take
from warm_dist.data import Batch
from warm_dist.errors import DataError
from warm_dist.store import s3
from warm_dist.store.base import Store
from warm_dist.store.open import open_store
from warm_dist.store.s3 import S3Store
from warm_dist.store.seaweedfs import S3Server

if TYPE_CHECKING:
    from tests.support.packed import Packed

SURVIVED = FAULTS[:5]
COUNT = 60  # batches of 32: more than the 1,797 images of an epoch
WORLD = 2
OPTIONS = {"chunk": 32, "window": 64, "buffer_bytes": 1 << 20}  # about 160 requests


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.endpoint_url) as running:
        yield running


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rules with short waits."""
    monkeypatch.setattr(s3, "READ_S", 0.2)
    monkeypatch.setattr(s3, "BACKOFF_S", 0.01)


@pytest.fixture(scope="module")
def unbroken(digits: Packed) -> list[Batch]:
    return take(digits.manifest, open_store(digits.url, digits.endpoint_url), 0, COUNT, **OPTIONS)


def through(proxy: FaultyProxy, digits: Packed) -> Store:
    bucket, _, prefix = digits.url.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, proxy.url)


def global_batches(proxy: FaultyProxy, digits: Packed, count: int = COUNT) -> list[Batch]:
    """Both ranks at once, two threads each, as they would be in two processes."""

    def rank_batches(rank: int) -> list[Batch]:
        return take(digits.manifest, through(proxy, digits), 0, count, rank=rank, world=WORLD, threads=2, **OPTIONS)

    with ThreadPoolExecutor(WORLD) as pool:
        ranks = list(pool.map(rank_batches, range(WORLD)))
    return [joined(list(parts)) for parts in zip(*ranks, strict=True)]


def assert_unbroken(batches: list[Batch], unbroken: list[Batch]) -> None:
    """Keys, positions, labels and pixels, none lost and none doubled."""
    assert len(batches) == len(unbroken)
    assert all(equal(one, other) for one, other in zip(batches, unbroken, strict=True))
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys[:1797])) == 1797


@pytest.mark.parametrize("fault", SURVIVED)
def test_each_fault_is_survived_with_every_image_once(
    proxy: FaultyProxy, digits: Packed, unbroken: list[Batch], hasty: None, fault: str
) -> None:
    proxy.stall_s, proxy.plan = 5.0, share(seed=1, probability=0.25, faults=(fault,))
    assert_unbroken(global_batches(proxy, digits), unbroken)
    assert proxy.counts[fault] >= 20
    assert proxy.counts.total() == proxy.counts[fault] < proxy.requests / 2


def test_all_of_them_mixed(proxy: FaultyProxy, digits: Packed, unbroken: list[Batch], hasty: None) -> None:
    """Fault: a read that gives up or starts afresh when its next failure is of another kind."""
    proxy.stall_s, proxy.plan = 5.0, share(seed=2, probability=0.3, faults=SURVIVED)
    assert_unbroken(global_batches(proxy, digits), unbroken)
    assert all(proxy.counts[fault] >= 3 for fault in SURVIVED)


def test_a_stall_costs_one_timeout_and_what_had_come_is_kept(proxy: FaultyProxy, digits: Packed, hasty: None) -> None:
    """Half of the body came before the silence: the second request asks for the other half."""
    asked: list[str] = []
    proxy.stall_s = 30.0
    proxy.plan = lambda path, range_, before: (asked.append(range_), "stalled" if len(asked) == 1 else None)[1]
    store = through(proxy, digits)
    name = digits.manifest.shards[0].name
    etag = store.stat(name).etag
    begun = time.monotonic()
    data = store.read(name, 1000, 200_000, etag)
    assert time.monotonic() - begun < 5
    assert data == open_store(digits.url, digits.endpoint_url).read(name, 1000, 200_000)
    assert asked == ["bytes=1000-200999", "bytes=101000-200999"]


def test_flipped_bytes_are_an_error_with_image_and_shard(
    proxy: FaultyProxy, digits: Packed, unbroken: list[Batch], hasty: None
) -> None:
    """Only the crc32 can know; the batches before it are right."""
    with closing(loader(digits.manifest, through(proxy, digits), **OPTIONS)) as reader:
        batches = reader.batches(0)
        delivered = list(islice(batches, 5))
        # npy headers and tar padding are a third of these bytes; a flip there is no image's, so every body gets one
        proxy.plan = lambda *_: "flipped"
        with pytest.raises(DataError, match=r"image '.*' in shard .*\.tar: its crc32 is not the manifest's"):
            delivered.extend(batches)
    assert proxy.counts["flipped"] > 0
    assert all(equal(one, other) for one, other in zip(delivered, unbroken, strict=False))


@pytest.fixture
def copy(digits: Packed, request: pytest.FixtureRequest) -> Packed:
    """The data set once more, to be damaged."""
    url = f"{digits.url}-{request.node.name}"
    source, target = open_store(digits.url, digits.endpoint_url), open_store(url, digits.endpoint_url)
    for shard in digits.manifest.shards:
        target.write(shard.name, source.read(shard.name))
    return digits._replace(url=url)


@pytest.mark.parametrize(("what", "words"), [("replaced", "was replaced"), ("deleted", "does not exist")])
def test_a_shard_that_changes_under_the_reader_is_an_error_that_names_it(
    proxy: FaultyProxy, copy: Packed, unbroken: list[Batch], hasty: None, what: str, words: str
) -> None:
    """Between two requests, on a network that breaks bodies too: a half of the old is never glued to one of the new."""
    direct, name = open_store(copy.url, copy.endpoint_url), copy.manifest.shards[1].name
    proxy.plan = share(seed=3, probability=0.2, faults=("reset", "truncated"))
    with closing(loader(copy.manifest, through(proxy, copy), **OPTIONS)) as reader:
        batches = reader.batches(0)
        delivered = list(islice(batches, 5))
        if what == "replaced":
            direct.write(name, direct.read(name)[:-1] + b"\1")
        else:
            direct.delete(name)
        with pytest.raises(DataError, match=f"{name}: {words}"):
            delivered.extend(batches)
    assert len(delivered) < COUNT
    assert all(equal(one, other) for one, other in zip(delivered, unbroken, strict=False))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_soak_ten_epochs_with_all_faults_at_one_request_in_five_and_nothing_shortened(
    proxy: FaultyProxy, digits: Packed
) -> None:
    """30 s stalls, 1 MB/s, boto3's and our own waits as in production.

    Fault: PATIENCE_S too short for several stalls of READ_S, which the shortened waits cannot show.
    """
    count = 10 * 1797 // 32
    unbroken = take(digits.manifest, open_store(digits.url, digits.endpoint_url), 0, count, **OPTIONS)
    proxy.plan = share(seed=4, probability=0.2, faults=SURVIVED)
    begun = time.monotonic()
    assert_unbroken(global_batches(proxy, digits, count), unbroken)
    print(f"{proxy.requests} requests, {dict(proxy.counts)}, {time.monotonic() - begun:.0f} s")
    assert all(proxy.counts[fault] >= 8 for fault in SURVIVED)
