from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.worker import config, info
from warm_dist import evaluation
from warm_dist.distributed import StopSignal, World
from warm_dist.errors import Stopped
from warm_dist.evaluation import Evaluator, Polls, in_order
from warm_dist.generate import build_network

EVAL = {"eval_nimg": 80, "num_images": 20, "extractor": "pixels", "grid": 2, "batch_size": 8}


@pytest.mark.parametrize("num_images", [1, 16, 17, 31, 33, 40])
def test_ranks_ask_equally_often_however_images_are_dealt(monkeypatch, tmp_path, num_images):
    settings = config(tmp_path, eval={**EVAL, "num_images": max(2, num_images)}).eval.model_copy(
        update={"num_images": num_images}
    )
    asked = []
    monkeypatch.setattr(evaluation, "any_rank", lambda world, flag: asked.append(world.rank))
    for rank in range(3):
        polls = Polls(World(rank, 3, torch.device("cpu"), None), StopSignal(), settings)
        share = len(range(rank, num_images, 3))
        for _ in range(0, share, settings.batch_size):
            polls.once()
        polls.rest()
    assert asked.count(0) == asked.count(1) == asked.count(2) > 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_split_of_the_floor_knows_no_world_size(world_size):
    rows = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    assert np.array_equal(in_order([rows[rank::world_size] for rank in range(world_size)]), rows)


@pytest.fixture
def evaluator(tmp_path: Path) -> Evaluator:
    settings = config(tmp_path, eval=EVAL, sampler={"method": "heun", "num_steps": 2})
    real = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)
    return Evaluator(settings, World(0, 1, torch.device("cpu"), None), info(), lambda rows: real[rows], tmp_path, print)


def test_an_evaluation_is_a_number_beside_its_floor_and_a_picture(evaluator, tmp_path):
    weights = build_network(evaluator.config).state_dict()
    first = evaluator(weights, 80, StopSignal())
    assert (tmp_path / first["grid"]).exists()
    assert first["floor_n"] == 20
    assert 0 < first["floor"] < first["frechet"]
    again = Evaluator(
        evaluator.config, evaluator.world, evaluator.info, pytest.fail, tmp_path, print
    )  # statistics are kept
    assert again(weights, 80, StopSignal())["frechet"] == first["frechet"]


def test_a_stop_ends_it_between_two_batches(evaluator):
    stop = StopSignal()
    stop.name = "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM during evaluation"):
        evaluator(build_network(evaluator.config).state_dict(), 80, stop)


def test_what_changes_the_number_changes_the_spec(evaluator):
    plain = evaluator.config.sampler
    changes = [{"num_steps": 3}, {"method": "multistep"}, {"bnr": 0.3}, {"grid": "log_linear"}, {"guidance": 2.0}]
    changes += [{"method": "ancestral"}, {"method": "ancestral", "eta": 0.5}, {"start": "plain"}, {"rho": 5.0}]
    specs = {evaluator.spec(plain.model_copy(update=change)).hash for change in [{}, *changes]}
    assert len(specs) == len(changes) + 1
    assert evaluator.spec(plain.model_copy(update={"eta": 0.5})).hash == evaluator.spec(plain).hash  # heun knows no eta
