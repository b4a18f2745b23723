"""What the training loop decides by itself: a step's learning rate, loss and averages, and whose checkpoints it takes up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.networks import weight
from tests.support.tiny_run import BATCH, batches, config, info
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.config.load import dump
from warm_dist.diffusion.heads import coefficients
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World
from warm_dist.errors import CheckpointError, DataError
from warm_dist.runs.metrics import MetricsLog, read_metrics
from warm_dist.training.inputs import prepare
from warm_dist.training.step_metrics import SUMS
from warm_dist.training.trainer import Trainer, learning_rate

ALONE = World(0, 1, torch.device("cpu"), None)


def test_the_learning_rate_rises_from_the_first_step_and_falls_to_nothing_after_the_last(tmp_path):
    settings = config(tmp_path, train__lr=0.1, train__lr_ramp_nimg=BATCH * 4, train__lr_decay_nimg=BATCH * 5)
    total = settings.train.total_nimg
    steps = [learning_rate(settings, nimg) for nimg in range(0, total, BATCH)]
    assert steps[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert steps[-6:] == pytest.approx([0.1, 0.1, 0.08, 0.06, 0.04, 0.02])
    short = config(
        tmp_path,
        train__lr=0.1,
        train__lr_ramp_nimg=BATCH * 4,
        train__lr_decay_nimg=BATCH * 4,
        train__total_nimg=BATCH * 4,
    )
    rates = [learning_rate(short, nimg) for nimg in range(0, BATCH * 4, BATCH)]
    assert rates == pytest.approx([0.1 * 1 / 4 * 4 / 4, 0.1 * 2 / 4 * 3 / 4, 0.1 * 3 / 4 * 2 / 4, 0.1 * 4 / 4 * 1 / 4])
    plain = config(tmp_path, train__lr=0.1, train__lr_ramp_nimg=0)
    assert {learning_rate(plain, nimg) for nimg in (0, total - BATCH)} == {0.1}


def test_each_step_is_given_and_logs_its_own_learning_rate(tmp_path, monkeypatch):
    settings = config(tmp_path, engine="local", train__lr_ramp_nimg=BATCH * 4, train__total_nimg=BATCH * 3)
    trainer = Trainer(settings, ALONE, info(), print)
    given: list[float] = []
    step = trainer.engine.step
    monkeypatch.setattr(trainer.engine, "step", lambda lr: given.append(lr) or step(lr))
    path = tmp_path / "metrics.jsonl"
    trainer.fit(batches(ALONE, 0), MetricsLog(path, 1), StopSignal(), None, set())
    assert given == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3])
    assert [line["lr"] for line in read_metrics(path) if line["kind"] == "train"] == given


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
        trainer.step(data._replace(condition=(torch.arange(BATCH) // 4,)))
        norms.append(float(trainer.grad_norm))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_what_is_learned_is_the_mean_of_each_micro_batch_s_total(tmp_path, monkeypatch):
    """Fault: the residual is left out of the gradient, or its weight is, though both stand in the log."""
    settings = config(tmp_path, engine="local", process__residual_weight="denoiser", train__micro_batch_size=BATCH // 2)
    trainer, given, results = Trainer(settings, ALONE, info(), print), [], []
    backward, loss = trainer.engine.backward, trainer.loss
    monkeypatch.setattr(trainer.engine, "backward", lambda value: given.append(value.item()) or backward(value))
    trainer.loss = lambda *args, **options: results.append(loss(*args, **options)) or results[-1]
    data = prepare(next(batches(ALONE, 0)), settings, trainer.info, ALONE.device)
    trainer.step(data)
    c = coefficients(torch.full((8, 8), 0.25).double(), data.level)
    blurry, residual = (torch.cat([result[head] for result in results]).detach() for head in (0, 1))
    expected = blurry + (c.c_out_r / c.c_out_b).square() * residual
    assert given == pytest.approx(expected.view(2, -1).mean(1).tolist())
    assert trainer.metrics.num_steps == 1


def test_the_averages_follow_the_weights_after_each_step(tmp_path):
    """Fault: averages of the weights before the step, or at another nimg, or without the config's ramp."""
    changes = {"half_life_nimg": 25, "ramp": 0.5, "lengths": [0.1]}
    settings = config(
        tmp_path,
        engine="local",
        train__micro_batch_size=BATCH // 2,
        **{f"train__ema_{k}": v for k, v in changes.items()},
    )
    trainer, source = Trainer(settings, ALONE, info(), print), batches(ALONE, 0)
    now = trainer.engine.shard()[0].master
    half_life = power = before = now.double()
    for nimg in range(BATCH, BATCH * 5, BATCH):
        trainer.step(prepare(next(source), settings, trainer.info, ALONE.device))
        half_life = half_life + (1 - 0.5 ** (BATCH / min(25, 0.5 * nimg))) * (now - half_life)
        power = power + (1 - (1 - BATCH / nimg) ** (6.94 + 1)) * (now - power)  # docs/mathematics.md, section 7
    for name, expected in (("ema", half_life), ("ema_0.1", power)):
        assert float((trainer.emas[name].values[0] - expected).norm()) < 1e-3 * float((now - before).norm())


def test_the_averages_are_evaluated_when_it_is_due_and_once(tmp_path):
    """Fault: the weights themselves are; the untrained network is though nobody asked, the trained one is not, or twice."""
    due = {"eval_nimg": BATCH * 2, "num_images": 2, "before_training": False}
    settings = config(tmp_path, engine="local", eval=due, train__total_nimg=BATCH * 7)
    trainer, seen = Trainer(settings, ALONE, info(), print), {}

    def evaluate(weights: dict[str, torch.Tensor], nimg: int, stop: StopSignal) -> dict[str, float]:
        assert nimg not in seen
        seen[nimg] = weights["flat"], trainer.emas["ema"].full(ALONE, trainer.shapes)["flat"]
        return {"frechet": 1.0}

    evaluated = {BATCH * 4}  # before a resume
    trainer.fit(batches(ALONE, 0), None, StopSignal(), evaluate, evaluated)
    assert list(seen) == [BATCH * 2, BATCH * 6, BATCH * 7]
    assert evaluated == {*seen, BATCH * 4}
    for given, average in seen.values():
        assert torch.equal(given, average)
    assert not torch.equal(seen[BATCH * 7][0], trainer.engine.module.flat)


def test_dropout_has_other_masks_in_each_step_and_the_same_after_a_resume(tmp_path):
    """Fault: every step drops the same activations, or what a resumed step drops depends on what went before."""
    settings, seeds = config(tmp_path, engine="local"), []
    for begin, count in ((0, 3), (BATCH * 2, 1)):
        trainer, source = Trainer(settings, ALONE, info(), print), batches(ALONE, begin)
        trainer.nimg = begin
        loss = trainer.loss
        trainer.loss = lambda *args, loss=loss, **options: seeds.append(torch.initial_seed()) or loss(*args, **options)
        torch.manual_seed(len(seeds))
        for _ in range(count):
            trainer.step(prepare(next(source), settings, trainer.info, ALONE.device))
    assert len(set(seeds[:3])) == 3
    assert seeds[3] == seeds[2]


def test_a_resumed_run_goes_on_with_its_steps_and_the_sums_of_its_line(tmp_path):
    """Fault: the first line after a resume leaves out the images before it, or Adam's moments begin anew."""
    settings = config(tmp_path, engine="local")
    for steps_before in (0, 2):
        storage = CheckpointManager(tmp_path, ALONE, settings.checkpoint, print)
        trainer, source = Trainer(settings, ALONE, info(), print, storage), batches(ALONE, steps_before * BATCH)
        trainer.restore()
        assert (trainer.nimg, trainer.num_steps) == (steps_before * BATCH, steps_before)
        for _ in range(2):
            trainer.step(prepare(next(source), settings, trainer.info, ALONE.device))
        trainer.save()
    assert trainer.metrics.sums[SUMS.index("images")] == 4 * BATCH
    assert {float(state["step"]) for state in trainer.engine.optimizer.state.values()} == {4.0}


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


def test_data_of_one_colour_are_refused_by_name(tmp_path):
    """Fault: they end in a non-finite loss, and the advice is to lower the learning rate."""
    for sigma_data in (0.0, 2e-8):
        flat = replace(info(), sigma_data=sigma_data)
        words = r"data\.manifest .*: all images are one colour, 128, 128, 128 of 255 \(sigma_data .*\); check how they"
        with pytest.raises(DataError, match=words):
            Trainer(config(tmp_path, engine="local"), ALONE, flat, print)
    faint = replace(info(), sigma_data=2e-3)
    assert Trainer(config(tmp_path, engine="local"), ALONE, faint, print).nimg == 0
