"""What the training loop decides by itself: the learning rate of a step, and whose checkpoints it takes up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.networks import weight
from tests.support.tiny_run import BATCH, batches, config, info
from warm_dist.config.load import dump
from warm_dist.distributed.world import World
from warm_dist.errors import CheckpointError
from warm_dist.training.inputs import prepare
from warm_dist.training.trainer import Trainer, learning_rate

ALONE = World(0, 1, torch.device("cpu"), None)


def test_the_learning_rate_rises_from_the_first_step_and_falls_to_nothing_after_the_last(tmp_path):
    settings = config(tmp_path, train__lr=0.1, train__lr_ramp_nimg=BATCH * 4, train__lr_decay_nimg=BATCH * 5)
    total = settings.train.total_nimg
    steps = [learning_rate(settings, nimg) for nimg in range(0, total, BATCH)]
    assert steps[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert steps[-6:] == pytest.approx([0.1, 0.1, 0.08, 0.06, 0.04, 0.02])
    plain = config(tmp_path, train__lr=0.1, train__lr_ramp_nimg=0)
    assert {learning_rate(plain, nimg) for nimg in (0, total - BATCH)} == {0.1}


def test_each_step_is_given_its_own_learning_rate(tmp_path, monkeypatch):
    trainer = Trainer(config(tmp_path, engine="local", train__lr_ramp_nimg=BATCH * 4), ALONE, info(), print)
    given: list[float] = []
    step = trainer.engine.step
    monkeypatch.setattr(trainer.engine, "step", lambda lr: given.append(lr) or step(lr))
    source = batches(ALONE, 0)
    for _ in range(3):
        trainer.step(prepare(next(source), trainer.config, trainer.info, ALONE.device))
    assert given == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3])


def test_micro_batches_have_their_own_levels_noise_and_classes(tmp_path):
    """One step whole and in four parts has the same gradient, so the same norm."""
    norms = []
    for micro in (BATCH, BATCH // 4):
        settings = config(
            tmp_path, engine="local", data__num_classes=4, train__clip=None, train__micro_batch_size=micro
        )
        trainer = Trainer(settings, ALONE, info(), print)
        torch.nn.init.normal_(
            weight(trainer.engine.module, "conv_out.weight"), std=0.1
        )  # else the loss would not know of classes
        data = prepare(next(batches(ALONE, 0)), settings, trainer.info, ALONE.device)
        trainer.step(data._replace(condition=(torch.arange(BATCH) % 4,)))
        norms.append(float(trainer.grad_norm))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "another"}, "made from data another, this run reads synthetic"),
        ({"config": {"process__bnr": 0.4}}, "made with process"),
        ({"config": {"train__seed": 1}}, "made with train.seed 1, this run has 0"),
        ({"nimg": BATCH + 1}, "is not a multiple of train.batch_size"),
    ],
)
def test_another_run_s_checkpoint_is_refused(tmp_path, changes, words):
    mine = config(tmp_path, engine="local")
    trainer = Trainer(mine, ALONE, info(), print)
    meta = {"fingerprint": "synthetic", "nimg": BATCH, "config": {}, **changes}
    meta["config"] = dump(config(tmp_path, engine="local", **meta["config"]))
    saved: Any = type("Saved", (), {"meta": meta})
    with pytest.raises(CheckpointError, match=words):
        trainer._check(saved)
