"""Any EMA length after the fact, against quadrature and against the average tracked directly."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from launch import ema as command
from tests.support.commands import call
from tests.support.tiny_run import ALONE, BATCH, batches, config, info
from warm_dist.checkpoints.format import SNAPSHOTS, complete_names
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.checkpoints.weights import load_weights
from warm_dist.distributed.stop import StopSignal
from warm_dist.errors import CheckpointError, ConfigError
from warm_dist.store.open import open_store
from warm_dist.training.ema import EMA, exponent_of, kind_of, power
from warm_dist.training.posthoc_ema import combination, inner_products, mismatch
from warm_dist.training.trainer import Trainer


def test_inner_products_equal_quadrature():
    x = (np.arange(400_000) + 0.5) / 400_000 * 3
    for t_a, gamma_a, t_b, gamma_b in ((1, 7, 3, 17), (3, 7, 1, 17), (2, 7, 2, 7), (3, 0.5, 2.5, 4)):
        profiles = [np.where(x < t, (g + 1) * x**g / t ** (g + 1), 0) for t, g in ((t_a, gamma_a), (t_b, gamma_b))]
        exact = inner_products(*(np.array(float(v)) for v in (t_a, gamma_a, t_b, gamma_b)))
        assert float(exact) == pytest.approx((profiles[0] * profiles[1]).sum() * 3 / 400_000, rel=1e-3)


def test_a_combination_is_the_nearest_and_its_distance_is_told():
    """By quadrature of the profiles. Fault: a distance that is squared, or not relative to the wanted profile."""
    x = (np.arange(200_000) + 0.5) / 200_000 * 3
    times, gammas = np.array([1.0, 2.0, 3.0, 3.0]), np.array([7.0, 17.0, 7.0, 17.0])

    def profile(t: float, g: float) -> np.ndarray:
        return np.where(x < t, (g + 1) * x**g / t ** (g + 1), 0)

    profiles, wanted = np.stack([profile(t, g) for t, g in zip(times, gammas, strict=True)]), profile(2.5, 10)

    def distance(factors: np.ndarray) -> float:
        return float(np.linalg.norm(factors @ profiles - wanted) / np.linalg.norm(wanted))

    factors = combination(times, gammas, 2.5, 10)
    for some in (factors, factors + 0.1, np.zeros(4)):
        assert mismatch(some, times, gammas, 2.5, 10) == pytest.approx(distance(some), rel=1e-3)
    assert factors.sum() == pytest.approx(1, abs=1e-9), "an average of weights that are all equal is these weights"
    changes = [one - other for one in np.eye(4) for other in np.eye(4) if one is not other]
    assert 0.1 < distance(factors) < min(distance(factors + 0.01 * change) for change in changes if change.any())


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
    direct = {kind_of(s): EMA(trainer.engine.shard(), partial(power, exponent_of(s))) for s in TRACKED}
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


def test_any_length_after_the_fact_equals_the_one_tracked_directly(run):
    path, trainer = run
    assert call(command.main, path, "--length", *TRACKED) == 0
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


def test_lengths_that_cannot_be_had(run, capsys):
    """Fault: an average that the snapshots cannot give is exported without a warning or an error."""
    path, _ = run
    assert call(command.main, path, "--length", 0.01) == 0
    assert "POOR" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--length \[0\.3\]: a relative width"):
        call(command.main, path, "--length", 0.3)
    with pytest.raises(ConfigError, match="no snapshot at nimg 999999999 or later"):
        call(command.main, path, "--length", 0.08, "--nimg", 999999999)
    with pytest.raises(CheckpointError, match=r"train\.ema_lengths"):
        call(command.main, path / "weights", "--length", 0.08)


def test_a_length_cannot_begin_in_mid_run(run):
    path, trainer = run
    changed = trainer.config.model_copy(
        update={"train": trainer.config.train.model_copy(update={"ema_lengths": (0.05, 0.2)})}
    )
    storage = CheckpointManager(path, ALONE, changed.checkpoint, print)
    with pytest.raises(CheckpointError, match=r"holds no EMA of length 0\.2"):
        Trainer(changed, ALONE, info(), print, storage).restore()
