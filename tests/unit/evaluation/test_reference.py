"""Statistics of the real images: measured once, kept where they can be, and never taken from a damaged file."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from tests.support.evaluators import REAL, Make
from tests.support.tiny_run import ALONE
from warm_dist.distributed.stop import StopSignal
from warm_dist.errors import AccessError
from warm_dist.evaluation import frechet, reference
from warm_dist.networks.unet import build_network
from warm_dist.store.folder import FolderStore


def test_reference_statistics_lie_beside_the_manifest_or_else_in_the_run(make: Make, tmp_path: Path) -> None:
    class ReadOnly(FolderStore):
        def write(self, path: str, data: bytes) -> None:
            raise AccessError(f"{path}: may not be written")

    beside, run = tmp_path / "data" / "reference", tmp_path / "run" / "reference"
    evaluator = make(stores=lambda url, endpoint: (ReadOnly if "data" in url else FolderStore)(Path(url)))
    weights = build_network(evaluator.config).state_dict()
    first = evaluator(weights, 80, StopSignal())
    assert not beside.exists()
    assert len(list(run.glob("*.safetensors"))) == 1
    again = make(read=pytest.fail, stores=lambda url, endpoint: FolderStore(Path(url)))
    assert again(weights, 80, StopSignal())["floor"] == first["floor"], "found in the second place"
    (kept,) = run.glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-7])  # cut short: measured anew, now beside the manifest
    assert make()(weights, 80, StopSignal())["frechet"] == pytest.approx(first["frechet"], rel=1e-9)
    assert len(list(beside.glob("*.safetensors"))) == 1


class Number:
    """An extractor whose one feature is the number that the image shows."""

    name, sha256, resize, num_features = "number", "ab", "none", 1

    def __call__(self, images: torch.Tensor) -> NDArray[np.float32]:
        return (images[:, 0, 0].float() @ torch.tensor([[1.0], [256.0]])).numpy()


def test_real_images_floor_and_rows_are_drawn_from_all_of_the_data() -> None:
    """Fault: the first ones, which a packer that was not told to shuffle may have from one class."""
    total, num_real, num_images, num_rows = 10_000, 1_000, 250, 200
    spec = reference.ReferenceSpec("number", "ab", "none", "cd", num_real, num_images, num_rows)
    read: list[int] = []

    def show(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        read.extend(rows.tolist())
        return np.stack([rows % 256, rows // 256], 1).astype(np.uint8)[:, None, None]

    found = reference.measure(ALONE, Number(), spec, total, show, 64, lambda done: None)
    assert len(set(read)) == len(read) == num_real
    std = total / 12**0.5
    assert np.mean(read) == pytest.approx(total / 2, abs=4 * std / num_real**0.5)
    assert (found.moments.n, float(found.moments.mean[0])) == (num_real, pytest.approx(np.mean(read)))
    assert len(set(found.rows[:, 0])) == num_rows
    assert set(found.rows[:, 0]) <= set(read)
    assert np.mean(found.rows) == pytest.approx(np.mean(read), abs=4 * std / num_rows**0.5)
    assert found.floor_n == num_images
    # of one feature the distance is (difference of means)² + (difference of stds)², here of random parts
    assert 0 < found.floor < 16 * std**2 * (1 / num_images + 1 / (num_real - num_images))
    everything = reference.measure(ALONE, Number(), replace(spec, num_real=total), total, show, 64, lambda done: None)
    assert read[num_real:] == list(range(total))
    assert everything.moments.n == total


def test_runs_of_a_machine_measure_the_reference_once(make: Make, tmp_path: Path) -> None:
    class ReadOnly(FolderStore):
        def write(self, path: str, data: bytes) -> None:
            raise AccessError(f"{path}: may not be written")

    def stores(url: str, endpoint: str | None) -> FolderStore:
        return (ReadOnly if "data" in url else FolderStore)(Path(url))

    read: list[int] = []
    begun, waiting = threading.Event(), threading.Event()

    def slowly(rows: Any) -> Any:
        begun.set()
        assert waiting.wait(30)
        read.extend(rows)
        return REAL[rows]

    def second() -> dict[str, Any]:
        assert begun.wait(30)
        other = make(read=pytest.fail, stores=stores, run="another", cache_dir=str(tmp_path / "node"))
        other.cache = Telling(other.cache, waiting.set)
        return other(weights, 80, StopSignal())

    first = make(read=slowly, stores=stores, cache_dir=str(tmp_path / "node"))
    weights = build_network(first.config).state_dict()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(first, weights, 80, StopSignal()), pool.submit(second)]
        assert len({future.result(60)["frechet"] for future in futures}) == 1
    assert sorted(read) == list(range(64))
    assert len(list((tmp_path / "node" / "reference").glob("*.safetensors"))) == 1


class Telling:
    """A folder that tells when somebody asks for a file in it: the next thing he does is wait for the lock."""

    def __init__(self, folder: Path | None, tell: Callable[[], None]) -> None:
        self.folder, self.tell = folder, tell

    def __truediv__(self, name: str) -> Path:
        self.tell()
        assert self.folder is not None
        return self.folder / name


def test_a_machine_s_turn_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    spec = reference.ReferenceSpec("pixels", "ab", "none", "cd", num_real=9, num_images=4, num_rows=3)
    with reference.turn(tmp_path, spec, 0), reference.turn(tmp_path, spec, 0.3), reference.turn(tmp_path, spec, 0):
        pass  # whoever waits in vain measures, too
    (tmp_path / "file").touch()
    with reference.turn(tmp_path / "file", spec, 5), reference.turn(None, spec, 5):
        pass  # a folder that cannot be made is none


def test_a_damaged_reference_is_as_good_as_none(tmp_path: Path) -> None:
    """A bit of every byte, of its header as of its numbers; and whole files of another shape."""
    store, stores = FolderStore(tmp_path), [FolderStore(tmp_path)]
    spec = reference.ReferenceSpec("pixels", "ab", "none", "cd", num_real=9, num_images=4, num_rows=3)
    rows = np.random.default_rng(0).random((9, 2), np.float32)
    known = reference.Reference(frechet.Moments.of(rows), rows[:3], 1.5, 4)
    assert reference.load(stores, spec) is None, "absent"
    assert reference.keep(stores, spec, known)
    good = store.read(spec.path)
    spared = 0
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        store.write(spec.path, bytes(bad))
        found = reference.load(stores, spec)
        spared += found is not None
        assert found is None or same(found, known), f"byte {place}"
    assert spared < 1.2 * len(json.dumps(vars(spec))), "only in the spec's text, which nothing reads"
    for cut in range(len(good)):
        store.write(spec.path, good[:cut])
        assert reference.load(stores, spec) is None
    wide = np.zeros((3, 5), np.float32)
    for other in (
        replace(known, rows=rows[:2]),
        replace(known, rows=wide),
        replace(known, rows=rows[0]),
        replace(known, moments=frechet.Moments.of(rows[:8])),
    ):
        reference.keep(stores, spec, other)
        assert reference.load(stores, spec) is None
    store.write(spec.path, save({"moments": known.moments.flat(), "rows": known.rows, "floor": np.array([1.5, 4])}))
    assert reference.load(stores, spec) is None, "no sha256"
    reference.keep(stores, spec, known)
    found = reference.load(stores, spec)
    assert found is not None
    assert same(found, known)


def same(a: reference.Reference, b: reference.Reference) -> bool:
    pairs = (a.moments.flat(), b.moments.flat()), (a.rows, b.rows), ((a.floor, a.floor_n), (b.floor, b.floor_n))
    return all(np.array_equal(x, y) for x, y in pairs)


def test_other_real_images_are_another_reference(make: Make, tmp_path: Path) -> None:
    weights = build_network(make().config).state_dict()
    for changes in ({}, {"num_images": 10}, {"reference_images": 32}, {"kid_images": 5}, {"batch_size": 5}):
        make(**changes)(weights, 80, StopSignal())
    assert len(list((tmp_path / "data" / "reference").glob("*"))) == 4, "the batch size changes nothing"
