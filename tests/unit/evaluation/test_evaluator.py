"""One evaluation on one process: numbers beside their floor, blocks of seeds, what is kept and what is said."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.evaluators import REAL, Make
from tests.support.tiny_run import ALONE, info
from warm_dist.distributed.stop import StopSignal
from warm_dist.errors import DataError, NumericsError, OutputError, Stopped
from warm_dist.evaluation import frechet, reference
from warm_dist.evaluation.extractors import Pixels
from warm_dist.evaluation.feature_stream import features
from warm_dist.evaluation.kid_precision_recall import kid, precision_recall
from warm_dist.networks.unet import build_network
from warm_dist.runs.metrics import Eval, Record


def test_an_evaluation_is_a_number_beside_its_floor_and_a_picture(make: Make, tmp_path: Path, said: list[str]) -> None:
    """Fault: a record lacks its floor or its picture, or the next evaluation reads all real images again."""
    evaluator = make()
    weights = build_network(evaluator.config).state_dict()
    first = evaluator(weights, 80, StopSignal())
    assert (tmp_path / "run" / first["grid"]).exists()
    assert (first["floor_n"], first["blocks"], first["spread"], first["nfe"], first["bnr"]) == (20, 1, None, 3, "0.5")
    assert 0 < first["floor"] < first["frechet"]
    assert first.keys() == Eval.__annotations__.keys() - Record.__annotations__.keys()
    assert f"floor {first['floor']:.2f} (real against real, 20 and 44), n 20, NFE 3" in said[-1]
    again = make(read=pytest.fail)  # the real images' statistics are kept
    assert again(weights, 80, StopSignal())["frechet"] == first["frechet"]


def test_the_numbers_are_those_of_all_features_at_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain way: draw all images, take all features, compare."""
    from warm_dist.checkpoints.weights import Model
    from warm_dist.evaluation.generate import generate

    neighbours: list[int] = []

    def counted(fake: Any, real: Any, k: int) -> tuple[float, float]:
        neighbours.append(k)
        return precision_recall(fake, real, k)

    monkeypatch.setattr("warm_dist.evaluation.evaluator.precision_recall", counted)
    evaluator = make(seed=5)
    evaluator.network.load_state_dict(build_network(evaluator.config).state_dict())
    picture = tmp_path / "grid.png"
    values = evaluator.block(evaluator.config.sampler, 0, StopSignal(), "test", picture)
    model = Model(evaluator.network, evaluator.config, info())
    images = generate(model, range(20), np.full(20, -1), seed=5, device=ALONE.device, batch_size=8)
    fake, real = features(Pixels(), images, 20), features(Pixels(), REAL, 64)
    assert values["frechet"] == pytest.approx(
        frechet.frechet_distance(frechet.Moments.of(fake), frechet.Moments.of(real)), rel=1e-9
    )
    floor = frechet.frechet_distance(*(frechet.Moments.of(real[part]) for part in frechet.floor_parts(64, 20, 0)))
    assert values["floor"] == pytest.approx(floor, rel=1e-9)
    kept = np.sort(reference.rng.generator(0, "reference rows").permutation(64)[:12])
    assert values["kid"] == pytest.approx(kid(fake[:12], real[kept]), rel=1e-9)
    assert (values["precision"], values["recall"]) == precision_recall(fake[:12], real[kept], 3)
    assert neighbours == [3], "as in the paper"
    tiles = np.asarray(Image.open(picture))[2:, 2:].reshape(2, 258, 2, 258, 3)[
        :, :256:32, :, :256:32
    ]  # of 8 by 8 pixels
    assert np.array_equal(tiles.transpose(0, 2, 4, 1, 3).reshape(4, 3, 8, 8), images[:4])


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
    """Fault: with eval.kid_images 0, KID, precision and recall are computed from no images, or logged as null."""
    evaluator = make(kid_images=0)
    values = evaluator(build_network(evaluator.config).state_dict(), 80, StopSignal())
    assert not values.keys() & {"kid", "precision", "recall"}


def test_labels_are_drawn_by_the_evaluation_s_own_seed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: labels drawn by train.seed, so that two runs of one recipe are measured on other classes."""
    drawn: list[int] = []

    def labels(model: Any, sampler: Any, seed: int, indices: Any) -> Any:
        drawn.append(seed)
        return np.full(len(indices), -1)

    monkeypatch.setattr("warm_dist.evaluation.evaluator.draw_labels", labels)
    evaluator = make(seed=5)
    assert evaluator.config.train.seed == 0
    evaluator.block(evaluator.config.sampler, 0, StopSignal(), "test", None)
    assert set(drawn) == {5}


def test_rank_0_waits_for_the_machine_s_turn_less_than_the_others_wait_for_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: rank 0 waits for another run's statistics for longer than parallel.timeout_s, and its peers give it up."""
    waits: list[float] = []
    turn = reference.turn
    monkeypatch.setattr(reference, "turn", lambda folder, spec, wait: waits.append(wait) or turn(folder, spec, 0))
    evaluator = make(cache_dir=str(tmp_path / "node"))
    evaluator._real(StopSignal())
    assert waits == [evaluator.config.parallel.timeout_s / 2]


def test_too_few_images_are_told_of(make: Make, said: list[str]) -> None:
    make(num_images=102, reference_images=64)
    assert [text.partition(" is too few")[0] for text in said] == ["warning: real images compared 64"]
    said.clear()
    make(num_images=101)
    assert "eval.num_images 101 is too few for 64 features; use 102 or more" in said[0], "1.6 x 64"


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
    told = [evaluator.identity(plain.model_copy(update=change))["spec"] for change in [{}, *changes]]
    assert told == [spec.hash for spec in specs], "of the sampler that was used, not of the config's"
    assert len({spec.measure for spec in specs}) == 1, "along the sampler numbers may be compared"
    assert make(num_images=21).spec(plain).measure != specs[0].measure
    assert make(kid_images=13).spec(plain).measure != specs[0].measure, "precision and recall depend on it"
    close = [evaluator.spec(plain.model_copy(update={"bnr": bnr})).hash for bnr in (0.1234567, 0.12345671)]
    assert close[0] != close[1]
    assert evaluator.spec(plain.model_copy(update={"eta": 0.5})).hash == evaluator.spec(plain).hash  # heun knows no eta
