"""The list of a sweep's trials: whole grids, paired draws, names that stay."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.spaces import BASE, sweep
from warm_dist.config.identity import digest
from warm_dist.sweeps.trials import constant_bnr, label_of, points, trials


def names(space, base=BASE, **more):
    return [trial.name for trial in trials(sweep(space, **more), base)]


def test_a_grid_is_the_whole_product_for_each_seed():
    space = {"process.bnr": {"grid": [0, 0.5, 2]}, "train.lr": {"grid": [0.001, 0.002]}}
    found = trials(sweep(space, seeds=[3, 7]), BASE)
    wanted = [(seed, bnr, lr) for seed in (3, 7) for bnr, lr in itertools.product((0, 0.5, 2), (0.001, 0.002))]
    assert [(t.seed, t.values["process.bnr"], t.values["train.lr"]) for t in found] == wanted
    assert [(t.config.train.seed, t.config.process.bnr, t.config.train.lr) for t in found] == wanted


def test_no_space_is_one_trial_a_seed():
    assert len(trials(sweep({}, seeds=[0, 1, 2]), BASE)) == 3


def test_draws_are_the_same_at_each_point_of_the_grid_and_for_each_seed():
    space = {"process.bnr": {"grid": [0, 1]}, "train.lr": {"log_uniform": [1e-4, 1e-2]}}
    found = trials(sweep(space, num_samples=4, seeds=[0, 1]), BASE)
    by_point = {}
    for t in found:
        by_point.setdefault((t.seed, t.values["process.bnr"]), []).append(t.values["train.lr"])
    assert len(by_point) == 4
    assert len({tuple(draws) for draws in by_point.values()}) == 1
    assert len(set(by_point[0, 0])) == 4


def test_more_draws_keys_and_seeds_only_add_trials():
    lr = {"train.lr": {"log_uniform": [1e-4, 1e-2]}}
    few, many = names(lr, num_samples=3), names(lr, num_samples=9, seeds=[0, 1])
    assert few == many[:3]
    two = {**lr, "process.p_std": {"uniform": [0.8, 1.6]}}
    assert [p["train.lr"] for p in points(sweep(two, num_samples=3))] == [
        p["train.lr"] for p in points(sweep(lr, num_samples=3))
    ]
    assert [p["train.lr"] for p in points(sweep(lr, num_samples=3, search_seed=1))] != [
        p["train.lr"] for p in points(sweep(lr, num_samples=3))
    ]


def test_each_key_has_draws_of_its_own():
    """With one number for all, a search would only walk along the diagonal of the space."""
    space = {"process.p_mean": {"uniform": [0, 1]}, "process.p_std": {"uniform": [0, 1]}}
    assert all(p["process.p_mean"] != p["process.p_std"] for p in points(sweep(space, num_samples=3)))


def test_a_choice_that_is_drawn_twice_is_one_trial():
    space = {"train.lr": {"choice": [0.001, 0.002]}}
    found = names(space, num_samples=20)
    assert len(found) == len(set(found)) == 2


def test_a_trial_s_values_are_its_own():
    path = {"kind": "power", "bnr": 0.5, "exponent": 0.1}
    first, second = trials(sweep({"process.bnr": {"grid": [path]}, "train.lr": {"grid": [0.1, 0.2]}}), BASE)
    assert first.values["process.bnr"] == second.values["process.bnr"] == path
    assert first.config.process.bnr.exponent == 0.1


def test_draws_have_the_distribution_that_they_claim():
    space = {
        "train.lr": {"log_uniform": [1e-4, 1e-2]},
        "process.p_mean": {"uniform": [-2, 1]},
        "network.channels": {"choice": [16, 24, 32, 48]},
    }
    n = 4000
    found = points(sweep(space, num_samples=n))
    logs = sorted(math.log10(p["train.lr"]) for p in found)
    uniform = sorted(p["process.p_mean"] for p in found)
    # Kolmogorov-Smirnov: P(D > 1.95/sqrt(n)) is 0.1 %; the draws are fixed, so it passes always or never
    for values, low, high in ((logs, -4, -2), (uniform, -2, 1)):
        assert low <= values[0]
        assert values[-1] <= high
        gap = max(abs((v - low) / (high - low) - k / n) for k, v in enumerate(values))
        assert gap < 1.95 / math.sqrt(n) + 1e-4
    counts = [sum(p["network.channels"] == c for p in found) for c in (16, 24, 32, 48)]
    assert sum((c - n / 4) ** 2 / (n / 4) for c in counts) < 16.3  # chi-squared, 3 degrees, 0.1 %


def test_what_is_incidental_does_not_change_a_name_and_all_else_does():
    (name,) = names({}, seeds=[0])
    for key, value in (
        ("data", {"endpoint_url": "http://x:1", "reader_threads": 5}),
        ("tracking", {"mlflow_url": "http://y:2"}),
    ):
        assert names({}, {**BASE, key: {**BASE.get(key, {}), **value}}) == [name]
    assert names({}, {**BASE, "output": "elsewhere", "description": "other words"}) == [name]
    for section, value in (
        ("train", {"lr": 0.5}),
        ("data", {"manifest": "s3://a/b/manifest.parquet"}),
        ("eval", {"num_images": 99}),
    ):
        assert names({}, {**BASE, section: {**BASE[section], **value}}) != [name]


def test_names_say_the_values_and_are_fit_for_folders():
    space = {
        "process.bnr": {"grid": [0.5, {"kind": "power", "bnr": 0.5, "exponent": 0.2}]},
        "process.residual_weight": {"grid": ["balanced"]},
        "train.betas": {"grid": [[0.9, 0.99]]},
    }
    first, second = names(space)
    assert first.startswith("bnr=0.5,residual_weight=balanced,betas=_0.9,_0.99_,seed=0-")
    assert second.startswith("bnr=power_0.5_0.2,residual_weight=balanced")
    assert first.rpartition("-")[2] != second.rpartition("-")[2]


def test_equal_last_parts_are_told_apart():
    assert label_of({"train.seed": 1, "eval.seed": 2, "train.lr": 0.1}) == "train.seed=1,eval.seed=2,lr=0.1"


@given(st.dictionaries(st.from_regex(r"[a-z]{1,9}(\.[a-z_]{1,12}){0,2}", fullmatch=True), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)))  # fmt: skip
def test_any_values_make_a_name_that_is_one_path_part(values):
    assert set(label_of(values)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,=+-")


def test_long_names_stay_short_and_unique():
    space = {f"sampler.{key}": {"grid": [1.23456, 2.34567]} for key in ("rho", "s_churn", "s_noise", "sigma_min")}
    space |= {
        "process.p_mean": {"uniform": [-2, 0]},
        "process.p_std": {"uniform": [0.5, 2]},
        "train.lr": {"uniform": [0.1, 1]},
    }
    found = names(space)
    assert len(set(found)) == 16
    assert max(map(len, found)) <= 89


def test_the_digest_is_that_of_the_whole_config():
    (trial,) = trials(sweep({}, seeds=[5]), BASE)
    assert trial.name == f"seed=5-{digest(trial.config)}"
    assert len(digest(trial.config)) == 8


@pytest.mark.parametrize(
    ("bnr", "number"),
    [(0, 0.0), (0.5, 0.5), ({"kind": "power", "bnr": 0.5, "exponent": 0.1}, None), ({"kind": "cold"}, None)],
)
def test_only_a_constant_bnr_is_a_number(bnr, number):
    (trial,) = trials(sweep({"process.bnr": {"grid": [bnr]}}), BASE)
    assert constant_bnr(trial.config) == number
