"""The reader: every image once per epoch, the same batches however they are read, and no damage unnoticed."""

from __future__ import annotations

import gc
import shutil
import sys
import threading
import tracemalloc
import zlib
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from data_pipelines.pack import pack
from data_pipelines.reading.lanes import Order
from data_pipelines.reading.loader import open_loader
from data_pipelines.shards.manifest import Manifest
from data_pipelines.sources.base import Sample, Source
from data_pipelines.sources.open import open_source
from tests.support.patience import until
from tests.support.reading import config, equal, joined, loader, take
from warm_dist.data import Batch
from warm_dist.errors import ConfigError, DataError, UnreachableError, WorldSizeError
from warm_dist.store.folder import FolderStore

if TYPE_CHECKING:
    from tests.support.packed import Packed


@pytest.fixture(scope="module")
def local(digits: Packed) -> tuple[Manifest, Path]:
    """All 1,797 digits in a folder; 1,797 is not divisible by any batch or lane count used here."""
    return digits.manifest, Path(digits.url)


@pytest.fixture
def own(local: tuple[Manifest, Path], tmp_path: Path) -> tuple[Manifest, Path]:
    """The same, to be damaged."""
    shutil.copytree(local[1], tmp_path / "own")
    return local[0], tmp_path / "own"


@pytest.fixture(scope="module")
def reference(local: tuple[Manifest, Path]) -> list[Batch]:
    return take(local[0], FolderStore(local[1]), 0, 130, buffer_bytes=1)


def test_each_image_exactly_once_per_epoch_with_its_own_pixels_and_label(
    local: tuple[Manifest, Path], reference: list[Batch]
) -> None:
    source = {item.key: item for item in open_source("digits", 8)}
    keys = [key for batch in reference for key in batch.keys]
    order = Order([shard.num_images for shard in local[0].shards], 3, 8, 16, 64)
    assert keys == local[0].key[order.row_of(np.arange(130 * 32))].tolist()
    images = np.concatenate([batch.images for batch in reference])
    labels = np.concatenate([batch.labels for batch in reference])
    assert np.array_equal(np.concatenate([batch.positions for batch in reference]), np.arange(130 * 32))
    assert images.shape == (130 * 32, 1, 8, 8)
    for epoch in range(2):
        assert len(set(keys[epoch * 1797 : (epoch + 1) * 1797])) == 1797
    assert keys[:1797] != keys[1797 : 2 * 1797]
    for key, image, label in zip(keys, images, labels, strict=True):
        sample = source[key[9:]]  # pack puts the number in front
        assert isinstance(sample, Sample)
        assert np.array_equal(image[0], sample.image[..., 0])
        assert label == sample.label


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("buffer_bytes", [1, 20_000, 1 << 30])
def test_batches_depend_neither_on_world_nor_threads_nor_memory(
    local: tuple[Manifest, Path], reference: list[Batch], world: int, threads: int, buffer_bytes: int
) -> None:
    ranks = [
        take(
            local[0], FolderStore(local[1]), 0, 130, rank=rank, world=world, threads=threads, buffer_bytes=buffer_bytes
        )
        for rank in range(world)
    ]
    for expected, *parts in zip(reference, *ranks, strict=True):
        assert all(len(part.positions) == 32 // world for part in parts)
        assert equal(joined(parts), expected)


def test_webdataset_reads_the_same_images(digits: Packed, reference: list[Batch]) -> None:
    import webdataset

    seen = {
        key: image for batch in reference[:57] for key, image in zip(batch.keys, batch.images, strict=True)
    }  # all of the first epoch
    urls = [f"{digits.url}/{shard.name}" for shard in digits.manifest.shards]
    theirs = {
        sample["__key__"]: sample["npy"].transpose(2, 0, 1).tobytes()
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()
    }
    assert theirs == {key: image.tobytes() for key, image in seen.items()}


class Counting(FolderStore):
    """Counts GETs and bytes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.lengths: list[int] = []
        self.lock = threading.Lock()

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        assert etag is not None
        data = super().read(path, start, length, etag)
        with self.lock:
            self.lengths.append(len(data))
        return data


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    """1,024 images of 12 KiB, so that a gap of several is not worth reading over."""
    images = np.random.default_rng(0).integers(0, 256, (1024, 64, 64, 3), np.uint8)
    source = Source(1024, (), "", lambda start, stop: [Sample(str(n), -1, images[n]) for n in range(start, stop)])
    folder = tmp_path_factory.mktemp("big")
    return pack(source, str(folder), shard_size=256), folder


def test_one_get_fetches_a_chunk_once_where_memory_allows_and_memory_is_bounded(
    big: tuple[Manifest, Path],
) -> None:
    manifest, folder = big
    image = 64 * 64 * 3
    for buffer_images, most_bytes, most_gets in ((1 << 20, 1.2, 64), (512, 3.0, 600)):
        store = Counting(folder)
        with closing(loader(manifest, store, chunk=16, window=128, buffer_bytes=buffer_images * image)) as reader:
            batches = reader.batches(0)
            keys = [key for batch in islice(batches, 2 * 32) for key in batch.keys]
            assert sorted(keys[:1024]) == sorted(keys[1024:]) == sorted(manifest.key)
            store.lengths.clear()  # blocks have grown to their full size by now
            assert len(list(islice(batches, 4 * 32))) == 128
        # Per epoch (one more than was consumed is read ahead): 64 chunks, neighbours among them are merged, 8 % are tar
        # and npy headers. Where memory is short, gaps are read over.
        assert sum(store.lengths) / 5 < most_bytes * 1024 * image
        assert len(store.lengths) / 5 < most_gets
        with closing(loader(manifest, store, chunk=16, window=128, buffer_bytes=buffer_images * image)) as reader:
            for block in islice(reader._blocks(0), 8):
                block.wait()
                assert block.images.nbytes <= max(buffer_images // 2, 32) * image
        assert max(store.lengths) > 4 * image


@pytest.mark.parametrize(("buffer_bytes", "threads"), [(1, 2), (1 << 20, 1), (2 << 20, 4), (6 << 20, 2)])
def test_the_memory_held_stays_below_the_bound_that_is_reported(
    big: tuple[Manifest, Path], buffer_bytes: int, threads: int
) -> None:
    """Three epochs; the reader's own account, and Python's of all that was allocated meanwhile."""
    manifest, folder = big
    image = 64 * 64 * 3
    with closing(loader(manifest, FolderStore(folder), buffer_bytes=buffer_bytes, threads=threads)) as reader:
        least = 3 * 32 * image + threads * int(manifest.length.max())
        assert reader.most_bytes <= max(buffer_bytes, least)
        reader.order.rows(3)  # an epoch's order is 8 KiB here, and 10 MB for ImageNet, whatever the buffer
        usual = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # threads take turns at every chance, also between an allocation and its account
        tracemalloc.start()
        try:
            for batch in islice(reader.batches(0), 3 * 32):
                del batch
            traced = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            sys.setswitchinterval(usual)
        assert 0.5 * reader.most_bytes < reader.peak_bytes <= reader.most_bytes
        # beside the bytes: numbers of rows and places, futures, frames: 100 bytes an image of two blocks, and some
        assert traced < reader.most_bytes + 300_000
        assert traced < reader.peak_bytes + 300_000  # nothing is left out of the account
    reader._pool.shutdown()  # closing does not wait for what is being read ahead
    gc.collect()
    assert reader._held.now == 0


def test_a_thread_that_is_slow_to_drop_its_last_call_holds_no_block(
    big: tuple[Manifest, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a pool's thread keeps the arguments of a call after its result, and with them a block that is done with."""
    with closing(loader(big[0], FolderStore(big[1]), buffer_bytes=2 << 20, threads=2)) as reader:
        submit, kept = reader._pool.submit, list[object]()

        def keep(*call: Any) -> Any:
            kept.append(call)
            return submit(*call)

        monkeypatch.setattr(reader._pool, "submit", keep)
        for batch in islice(reader.batches(0), 12):
            del batch
        assert len(kept) > 12
        assert reader.peak_bytes <= reader.most_bytes


@pytest.mark.parametrize("world", [1, 4])
def test_the_reader_says_what_a_whole_window_takes(local: tuple[Manifest, Path], world: int) -> None:
    """Fault: `whole_bytes` is too small, so a reader that is given that much still splits its windows."""
    store = FolderStore(local[1])
    with closing(loader(local[0], store, world=world, buffer_bytes=1)) as tight:
        assert tight.pieces == 16  # 8 lanes' windows of 64 images, in batches of 32
        whole_bytes = tight.whole_bytes
    with closing(loader(local[0], store, world=world, buffer_bytes=whole_bytes)) as roomy:
        assert roomy.pieces == 1
        assert roomy.most_bytes <= whole_bytes
        blocks = islice(roomy._blocks(0), 3)
        assert max(len(block.positions) for block in blocks) <= 512 // world


def test_read_gives_rows_in_the_order_asked_for(local: tuple[Manifest, Path]) -> None:
    with closing(loader(local[0], FolderStore(local[1]))) as reader:
        rows = np.array([1796, 0, 5, 5, 499, 500, 1001])
        images = reader.read(rows)
        everything = reader.read(np.arange(1797))
        assert reader.read(np.array([], np.int64)).shape == (0, 1, 8, 8)
    assert np.array_equal(images, everything[rows])
    expected = np.stack([item.image for item in open_source("digits", 8)]).transpose(0, 3, 1, 2)
    assert np.array_equal(everything, expected)


def test_a_corrupted_byte_is_a_data_error_with_key_and_shard(
    own: tuple[Manifest, Path], reference: list[Batch]
) -> None:
    manifest, folder = own
    shard = folder / manifest.shards[2].name
    data = bytearray(shard.read_bytes())
    data[manifest.offset[1100] + manifest.length[1100] - 1] ^= 255
    shard.write_bytes(data)
    words = f"image '{manifest.key[1100]}' in shard {shard.name}: its crc32"
    with closing(loader(manifest, FolderStore(folder))) as reader:
        delivered = []
        with pytest.raises(DataError, match=words):
            delivered.extend(islice(reader.batches(0), len(reference)))
        assert all(equal(one, other) for one, other in zip(delivered, reference, strict=False))
        assert all(manifest.key[1100] not in batch.keys for batch in delivered)
        with pytest.raises(DataError, match=words):
            reader.read(np.array([1100]))
        assert len(reader.read(np.array([1099, 1101]))) == 2


def test_an_undecodable_image_with_a_right_crc_is_named(tmp_path: Path) -> None:
    pixels = [Sample(str(n), -1, np.full((8, 8, 3), n, np.uint8)) for n in range(40)]
    manifest = pack(Source(40, (), "", lambda start, stop: pixels[start:stop]), str(tmp_path), payload="png")
    shard = tmp_path / manifest.shards[0].name
    data = bytearray(shard.read_bytes())
    start, end = manifest.offset[7], manifest.offset[7] + manifest.length[7]
    data[start + 45 : end] = bytes(end - start - 45)
    shard.write_bytes(data)
    crc = manifest.crc32.copy()
    crc[7] = zlib.crc32(data[start:end])
    with closing(loader(replace(manifest, crc32=crc), FolderStore(tmp_path))) as reader:
        with pytest.raises(DataError, match=f"image '{manifest.key[7]}' in shard {shard.name}: does not decode"):
            reader.read(np.arange(40))
        assert (reader.read(np.array([9])) == 9).all()


def test_missing_shortened_and_replaced_shards(own: tuple[Manifest, Path]) -> None:
    """Fault: a shard that is missing, cut or replaced is noticed only when one of its images does not decode."""
    manifest, folder = own
    path = folder / manifest.shards[1].name
    whole = path.read_bytes()
    with closing(loader(manifest, FolderStore(folder))) as reader:
        FolderStore(folder).write(path.name, whole)  # the same bytes, but somebody else's
        with pytest.raises(DataError, match=f"{path.name}: was replaced"):
            reader.read(np.array([700]))
        with pytest.raises(DataError, match=f"{path.name} .* was replaced"):
            reader.check()
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name}: does not exist"):
            reader.read(np.array([700]))
    with pytest.raises(DataError, match=f"shard {path.name} is missing from {folder}"):
        loader(manifest, FolderStore(folder))
    path.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=f"{path.name} .* has {len(whole) - 512} bytes, the manifest says {len(whole)}"):
        loader(manifest, FolderStore(folder))


class Failing(FolderStore):
    """Fails from the n-th read on."""

    def __init__(self, root: Path, after: int) -> None:
        super().__init__(root)
        self.left = after

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise UnreachableError("gone")
        return super().read(path, start, length, etag)


def test_a_store_that_goes_away_ends_the_iteration_and_no_thread_stays(local: tuple[Manifest, Path]) -> None:
    before = set(threading.enumerate())
    reader = loader(local[0], Failing(local[1], after=30), window=16, buffer_bytes=4096, threads=1)
    with closing(reader), pytest.raises(UnreachableError, match="gone"):
        for _ in reader.batches(0):
            pass
    until(lambda: set(threading.enumerate()) <= before)


def test_open_loader_checks_the_configuration_against_the_manifest(digits: Packed, reference: list[Batch]) -> None:
    with closing(open_loader(config(digits, num_classes=10), 0, 1)) as reader:
        assert equal(next(reader.batches(0)), reference[0])
        assert reader.manifest.info.num_images == 1797
    with closing(open_loader(config(digits), 1, 2)) as reader:
        assert (next(reader.batches(0)).labels == -1).all()
    for key, value in (("resolution", 16), ("channels", 3), ("num_classes", 7)):
        with pytest.raises(ConfigError, match=rf"data\.{key} is {value}, .* has \d+; set data\.{key}"):
            open_loader(config(digits, **{key: value}), 0, 1)
    with pytest.raises(WorldSizeError, match="valid sizes: 1, 2, 4, 8"):
        open_loader(config(digits), 0, 3)
    with pytest.raises(ConfigError, match=r"set data\.manifest"):
        open_loader(config(digits, manifest="s3://your-bucket/manifest.parquet"), 0, 1)
