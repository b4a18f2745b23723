"""The shipped configs, and the schema that editors read."""

from __future__ import annotations

import json

import pytest

from tests.support.paths import ROOT
from warm_dist.config.load import dump, known_keys
from warm_dist.config.run import Config, load_config, validate

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.json") if not path.name.startswith(("schema", "sweep_")))


def test_the_promised_configs_are_there():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "cifar10", "ffhq64", "lsun_church128", "imagenet64"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_complete_and_at_bnr_half(path):
    config = load_config(path)
    assert validate(dump(config)) == config
    assert config.process.bnr == 0.5
    assert config.description
    assert config.schema_url == "schema.json"


@pytest.mark.parametrize(
    ("name", "batch", "lr", "total", "half_life", "dropout", "nfe_steps"),
    [
        ("cifar10", 512, 1e-3, 200e6, 0.5e6, 0.13, 18),
        ("ffhq64", 256, 2e-4, 200e6, 0.5e6, 0.05, 40),
        ("imagenet64", 4096, 1e-4, 2500e6, 50e6, 0.1, 40),
    ],
)
def test_published_hyper_parameters(name, batch, lr, total, half_life, dropout, nfe_steps):
    """Fault: a value of a shipped config was changed for an experiment and no longer is EDM's."""
    c = load_config(ROOT / "configs" / f"{name}.json")
    assert (c.train.batch_size, c.train.lr, c.train.ema_half_life_nimg) == (batch, lr, half_life)
    assert c.train.total_nimg == pytest.approx(total, rel=1e-5)  # rounded up to whole batches
    assert (c.network.dropout, c.sampler.method, c.sampler.num_steps) == (dropout, "heun", nfe_steps)


def test_the_schema_file_is_the_models():
    kept = json.loads((ROOT / "configs" / "schema.json").read_text())
    assert kept == Config.model_json_schema(by_alias=True), "run: python -m warm_dist.config > configs/schema.json"


def test_no_key_could_hold_a_secret():
    assert not [
        key
        for key in known_keys(Config)
        if any(word in key.lower() for word in ("secret", "password", "token", "access_key"))
    ]
