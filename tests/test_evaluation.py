"""One evaluation on one process: numbers beside their floor, blocks of seeds, what is kept and what is said."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from tests.distributed.worker import config, info
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World
from warm_dist.errors import AccessError, DataError, NumericsError, OutputError, Stopped
from warm_dist.evaluation import frechet, reference
from warm_dist.evaluation.evaluator import Evaluator
from warm_dist.evaluation.extractors import Pixels
from warm_dist.evaluation.feature_stream import features
from warm_dist.evaluation.feature_stream import FeatureStream, batches_of
from warm_dist.evaluation.kid_precision_recall import kid, precision_recall
from warm_dist.networks.unet import build_network
from warm_dist.store.folder import FolderStore
from warm_dist.store.open import open_store

ALONE = World(0, 1, torch.device("cpu"), None)
EVAL = {"eval_nimg": 80, "num_images": 20, "extractor": "pixels", "grid": 2, "batch_size": 8, "kid_images": 12}
REAL = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)
Make = Callable[..., Evaluator]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, said: list[str]) -> Make:
    def evaluator(read: Any = lambda rows: REAL[rows], stores: Any = open_store, **changes: Any) -> Evaluator:
        settings = config(
            tmp_path / "run",
            eval={**EVAL, **changes},
            sampler={"method": "heun", "num_steps": 2},
            data__manifest=f"{tmp_path}/data/manifest.parquet",
        )
        return Evaluator(settings, ALONE, info(), read, tmp_path / "run", said.append, stores)

    return evaluator


@pytest.mark.parametrize("num_images", [1, 16, 17, 31, 33, 40])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_image_is_in_one_whole_batch_and_ranks_ask_equally_often(num_images: int, size: int) -> None:
    worlds = [World(rank, size, torch.device("cpu"), None) for rank in range(size)]
    dealt = [batches_of(world, num_images, 8) for world in worlds]
    numbers = sorted(number for mine, _ in dealt for batch in mine for number in batch)
    assert numbers == list(range(num_images))
    (most,) = {most for _, most in dealt}
    assert max(len(mine) for mine, _ in dealt) == most
    if num_images > 8 * (size - 1):  # a batch for every rank
        starts = sorted(batch.start for mine, _ in dealt for batch in mine)
        assert starts == list(range(0, num_images, 8)), "the same batches at any world size"


def test_batches_are_the_same_at_any_world_size_with_a_batch_for_every_rank() -> None:
    def dealt(size: int) -> list[range]:
        worlds = [World(rank, size, torch.device("cpu"), None) for rank in range(size)]
        return sorted((batch for world in worlds for batch in batches_of(world, 200, 64)[0]), key=lambda b: b.start)

    assert dealt(1) == dealt(2) == dealt(4) == [range(64), range(64, 128), range(128, 192), range(192, 200)]
    assert dealt(5) == [range(k, k + 40) for k in range(0, 200, 40)]


def test_streamed_features_are_those_of_all_images_at_once() -> None:
    parts = [np.arange(64) < 64, np.arange(64) % 3 == 0]
    kept = np.arange(64) % 2 == 1
    stream = FeatureStream(ALONE, Pixels(), parts, kept)
    for start in (32, 0, 48, 16):  # in any order
        stream.add(range(start, start + 16), REAL[start : start + 16])
    moments, rows = stream.result()
    whole = features(Pixels(), REAL, 64)
    assert np.array_equal(rows, whole[kept])
    for part, found in zip(parts, moments, strict=True):
        expected = frechet.Moments.of(whole[part])
        assert found.n == expected.n
        assert np.allclose(found.mean, expected.mean, rtol=1e-12)
        assert np.allclose(found.covariance, expected.covariance, rtol=1e-10, atol=1e-10)


def test_an_evaluation_is_a_number_beside_its_floor_and_a_picture(make: Make, tmp_path: Path, said: list[str]) -> None:
    evaluator = make()
    weights = build_network(evaluator.config).state_dict()
    first = evaluator(weights, 80, StopSignal())
    assert (tmp_path / "run" / first["grid"]).exists()
    assert (first["floor_n"], first["blocks"], first["spread"], first["nfe"], first["bnr"]) == (20, 1, None, 3, "0.5")
    assert 0 < first["floor"] < first["frechet"]
    assert f"floor {first['floor']:.2f} (real against real, 20 and 44), n 20, NFE 3" in said[-1]
    again = make(read=pytest.fail)  # the real images' statistics are kept
    assert again(weights, 80, StopSignal())["frechet"] == first["frechet"]


def test_the_numbers_are_those_of_all_features_at_once(make: Make) -> None:
    """Against the plain way: draw all images, take all features, compare."""
    from warm_dist.checkpoints.weights import Model
    from warm_dist.evaluation.generate import generate

    evaluator = make()
    evaluator.network.load_state_dict(build_network(evaluator.config).state_dict())
    values = evaluator.block(evaluator.config.sampler, 0, StopSignal(), "test", None)
    model = Model(evaluator.network, evaluator.config, info())
    images = generate(model, range(20), np.full(20, -1), seed=0, device=ALONE.device, batch_size=8)
    fake, real = features(Pixels(), images, 20), features(Pixels(), REAL, 64)
    assert values["frechet"] == pytest.approx(
        frechet.frechet_distance(frechet.Moments.of(fake), frechet.Moments.of(real)), rel=1e-9
    )
    floor = frechet.frechet_distance(*(frechet.Moments.of(real[part]) for part in frechet.floor_parts(64, 20, 0)))
    assert values["floor"] == pytest.approx(floor, rel=1e-9)
    kept = np.sort(reference.rng.generator(0, "reference rows").permutation(64)[:12])
    assert values["kid"] == pytest.approx(kid(fake[:12], real[kept]), rel=1e-9)
    assert (values["precision"], values["recall"]) == precision_recall(fake[:12], real[kept], 3)


def test_the_last_evaluation_has_all_blocks_with_mean_and_spread(make: Make, said: list[str]) -> None:
    evaluator = make(num_blocks=3)
    weights = build_network(evaluator.config).state_dict()
    total = evaluator.config.train.total_nimg
    last = evaluator(weights, total, StopSignal())
    sampler = evaluator.config.sampler
    blocks = [evaluator.block(sampler, k, StopSignal(), "again", None) for k in range(3)]
    distances = [block["frechet"] for block in blocks]
    assert len(set(distances)) == 3, "other seeds"
    assert last["blocks"] == 3
    assert last["frechet"] == pytest.approx(statistics.mean(distances), rel=1e-12)
    assert last["spread"] == pytest.approx(statistics.stdev(distances), rel=1e-9)
    assert f"{last['frechet']:.2f} ± {last['spread']:.2f}" in "".join(said)
    assert evaluator(weights, total - 16, StopSignal())["frechet"] == distances[0], "one block on the way"


def test_without_rows_there_is_no_kid(make: Make) -> None:
    evaluator = make(kid_images=0)
    values = evaluator(build_network(evaluator.config).state_dict(), 80, StopSignal())
    assert not values.keys() & {"kid", "precision", "recall"}


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
        other = make(read=pytest.fail, stores=stores, cache_dir=str(tmp_path / "node"))
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


def test_too_few_images_are_told_of(make: Make, said: list[str]) -> None:
    make(num_images=102, reference_images=64)
    assert [text.partition(" is little")[0] for text in said] == ["warning: real images compared 64"]
    said.clear()
    make(num_images=101)
    assert "eval.num_images 101 is little for 64 features; from 102 on" in said[0], "1.6 x 64"


def test_a_stop_ends_it_between_two_batches(make: Make) -> None:
    evaluator, stop = make(), StopSignal()
    stop.name = "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM during evaluation"):
        evaluator(build_network(evaluator.config).state_dict(), 80, stop)


def test_an_image_that_is_not_finite_ends_it(make: Make) -> None:
    evaluator = make()
    weights = {name: torch.full_like(value, torch.nan) for name, value in evaluator.network.state_dict().items()}
    with pytest.raises(NumericsError, match="non-finite image"):
        evaluator(weights, 80, StopSignal())


def test_real_images_or_a_picture_that_fail_end_it(make: Make, tmp_path: Path) -> None:
    def torn(rows: Any) -> Any:
        raise DataError("a torn shard")

    evaluator = make(read=torn)
    weights = build_network(evaluator.config).state_dict()
    with pytest.raises(DataError, match="a torn shard"):
        evaluator(weights, 80, StopSignal())
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "samples").write_text("in the way")
    with pytest.raises(OutputError, match="samples"):
        make()(weights, 80, StopSignal())


def test_what_changes_the_number_changes_the_spec(make: Make) -> None:
    evaluator = make()
    plain = evaluator.config.sampler
    changes = [{"num_steps": 3}, {"method": "multistep"}, {"bnr": 0.3}, {"grid": "log_linear"}, {"guidance": 2.0}]
    changes += [{"method": "ancestral"}, {"method": "ancestral", "eta": 0.5}, {"start": "plain"}, {"rho": 5.0}]
    specs = [evaluator.spec(plain.model_copy(update=change)) for change in [{}, *changes]]
    assert len({spec.hash for spec in specs}) == len(changes) + 1
    assert len({spec.measure for spec in specs}) == 1, "along the sampler numbers may be compared"
    assert make(num_images=21).spec(plain).measure != specs[0].measure
    assert make(kid_images=13).spec(plain).measure != specs[0].measure, "precision and recall depend on it"
    close = [evaluator.spec(plain.model_copy(update={"bnr": bnr})).hash for bnr in (0.1234567, 0.12345671)]
    assert close[0] != close[1]
    assert evaluator.spec(plain.model_copy(update={"eta": 0.5})).hash == evaluator.spec(plain).hash  # heun knows no eta
