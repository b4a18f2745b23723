"""Averages against closed forms, and any length after the fact against the average tracked directly."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.worker import BATCH, batches, config, info
from tests.processes import ROOT
from warm_dist.checkpoints.format import SNAPSHOTS, complete_names
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.checkpoints.weights import load_weights
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World
from warm_dist.errors import CheckpointError, ConfigError
from warm_dist.store.open import open_store
from warm_dist.training.ema import EMA, exponent_of, half_life, kind_of, power
from warm_dist.training.engine import Fragment
from warm_dist.training.posthoc_ema import combination, inner_products, mismatch
from warm_dist.training.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"), None)


def run_ema(decay, values: list[float], batch: int) -> float:
    master = torch.tensor([values[0]])
    ema = EMA([Fragment("w", 0, master, master, master)], decay)
    for k, value in enumerate(values[1:], 1):
        master.fill_(value)
        ema.update(k * batch, batch)
    return float(ema.values[0])


def test_half_life_halves():
    assert half_life(1000, None, 5000, 1000) == 0.5
    assert half_life(1000, 0.05, 5000, 250) == 0.5  # the ramp: 5 % of what was seen
    assert run_ema(partial(half_life, 40, None), [1.0] + [0.0] * 10, 8) == pytest.approx(0.25)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.2])
def test_exponent_has_the_relative_width_that_was_asked_for(sigma_rel):
    gamma = exponent_of(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)  # moments of tau^gamma on [0, 1]
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)


def test_exponents_are_the_published_ones():
    # EDM2 (arXiv 2312.02696): sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94
    assert [exponent_of(s) for s in (0.05, 0.10)] == pytest.approx([16.97, 6.94], abs=5e-3)


def test_power_average_is_the_integral_of_its_profile():
    gamma, steps = exponent_of(0.1), 50
    values = np.random.default_rng(0).normal(size=steps + 1)
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    assert run_ema(partial(power, gamma), values.tolist(), 16) == pytest.approx(np.diff(edges) @ values[1:], rel=1e-5)


def test_inner_products_equal_quadrature():
    x = (np.arange(400_000) + 0.5) / 400_000 * 3
    for t_a, gamma_a, t_b, gamma_b in ((1, 7, 3, 17), (3, 7, 1, 17), (2, 7, 2, 7), (3, 0.5, 2.5, 4)):
        profiles = [np.where(x < t, (g + 1) * x**g / t ** (g + 1), 0) for t, g in ((t_a, gamma_a), (t_b, gamma_b))]
        exact = inner_products(*(np.array(float(v)) for v in (t_a, gamma_a, t_b, gamma_b)))
        assert float(exact) == pytest.approx((profiles[0] * profiles[1]).sum() * 3 / 400_000, rel=1e-3)


def test_a_snapshot_that_is_wanted_is_taken_as_it_is():
    times, gammas = np.array([1.0, 2, 3, 1, 2, 3]) * 1e9, np.repeat([exponent_of(s) for s in (0.05, 0.1)], 3)
    factors = combination(times, gammas, 2e9, exponent_of(0.1))
    assert factors == pytest.approx([0, 0, 0, 0, 1, 0], abs=1e-9)
    assert mismatch(factors, times, gammas, 2e9, exponent_of(0.1)) < 1e-6
    with pytest.raises(ConfigError, match="the last is at 3000000000"):
        combination(times, gammas, 4e9, 7)


TRACKED = (0.06, 0.075, 0.09)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """200 steps with snapshots every 10, and three averages between the two tracked directly, by the same code."""
    path = tmp_path_factory.mktemp("posthoc") / "run"
    settings = config(
        path, engine="local", train__total_nimg=BATCH * 200, train__save_nimg=BATCH * 100, train__log_nimg=BATCH * 100,
        train__ema_lengths=[0.05, 0.1], train__snapshot_nimg=BATCH * 10, checkpoint__keep_last=1,
    )  # fmt: skip
    storage = CheckpointManager(path, ALONE, settings.checkpoint, print)
    trainer = Trainer(settings, ALONE, info(), lambda text: None, storage)
    direct = {kind_of(s): EMA(trainer.engine.owned(), partial(power, exponent_of(s))) for s in TRACKED}
    trainer.restore()
    saved = trainer.emas
    step = trainer.step

    def tracked(data):
        trainer.emas = saved | direct
        try:
            return step(data)
        finally:
            trainer.emas = saved

    trainer.step = tracked  # type: ignore[method-assign]
    trainer.fit(batches(ALONE, 0), None, StopSignal(), None, set())
    trainer.emas = saved | direct
    return path, trainer


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "launch" / "ema.py"), *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_any_length_after_the_fact_equals_the_one_tracked_directly(run):
    path, trainer = run
    done = command(str(path), "--length", *map(str, TRACKED))
    assert done.returncode == 0, done.stderr
    start = Trainer(trainer.config, ALONE, info(), print).engine.module.state_dict()
    for length in TRACKED:
        weights = dict(
            load_weights(path / "weights" / f"ema_{length:g}_{BATCH * 200:012d}.safetensors").network.named_parameters()
        )
        ema = trainer.emas[kind_of(length)]
        apart = scale = moved = 0.0
        for fragment, value in zip(ema.fragments, ema.values, strict=True):
            mine = weights[fragment.name].detach().flatten()
            apart += float((mine - value).square().sum())
            scale += float(value.square().sum())
            moved += float((value - start[fragment.name].flatten()).square().sum())
        assert (apart / scale) ** 0.5 < 1e-3
        assert (apart / moved) ** 0.5 < 5e-3  # also of the way that the weights have gone, not only of their size


def test_snapshots_stay_when_checkpoints_go(run):
    path, _ = run
    store = open_store(str(path))
    assert len(complete_names(store, SNAPSHOTS)) == 20
    assert len(complete_names(store, "checkpoints")) == 1


def test_lengths_that_cannot_be_had(run):
    path, _ = run
    poor = command(str(path), "--length", "0.01")
    assert poor.returncode == 0
    assert "POOR" in poor.stdout
    assert command(str(path), "--length", "0.3").returncode == ConfigError.exit_code
    late = command(str(path), "--length", "0.08", "--nimg", "999999999")
    assert late.returncode == ConfigError.exit_code
    assert "no snapshot at nimg 999999999 or later" in late.stderr
    none = command(str(path / "weights"), "--length", "0.08")
    assert none.returncode == CheckpointError.exit_code
    assert "train.ema_lengths" in none.stderr


def test_a_length_cannot_begin_in_mid_run(run):
    path, trainer = run
    changed = trainer.config.model_copy(
        update={"train": trainer.config.train.model_copy(update={"ema_lengths": (0.05, 0.2)})}
    )
    storage = CheckpointManager(path, ALONE, changed.checkpoint, print)
    with pytest.raises(CheckpointError, match=r"holds no EMA of length 0\.2"):
        Trainer(changed, ALONE, info(), print, storage).restore()
