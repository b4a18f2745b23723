"""Exported weights: a file that needs nothing else, and nothing else taken for one."""

import os
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.saved_state import save
from tests.support.tiny_run import ALONE
from warm_dist.checkpoints.weights import export_weights, load_weights, weights_path
from warm_dist.errors import CheckpointError, ConfigError
from warm_dist.runs.folder import WEIGHTS
from warm_dist.training.attempt import Attempt


def test_exported_weights_load_without_anything_else(tmp_path, state):
    settings, engine, ema = state
    saved = save(tmp_path, state, 80)
    for kind, values in (("ema", ema.values), ("master", [f.master for f in engine.shard()])):
        path = tmp_path / f"{kind}.safetensors"
        export_weights([(saved, kind, 1.0)], path)
        network, loaded, data = load_weights(path)
        assert loaded == settings
        assert data.fingerprint == "synthetic"
        parameters = dict(network.named_parameters())
        for fragment, value in zip(engine.shard(), values, strict=True):
            assert torch.equal(parameters[fragment.name].detach().flatten(), value)
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["nimg"] == "80"
    assert not list(tmp_path.glob(".*.part"))


def test_a_run_s_and_a_checkpoint_s_weights_are_the_averages(tmp_path, state):
    """Fault: samples are drawn from the last step's weights."""
    saved = save(tmp_path, state, 80)
    attempt = SimpleNamespace(world=ALONE, path=tmp_path, nimg=80, say=print)
    storage = SimpleNamespace(shared=True, saved={80: saved}.get)
    Attempt._finish(attempt, storage, [])
    for path in (tmp_path / WEIGHTS, weights_path(tmp_path / saved.name)):
        parameters = dict(load_weights(path).network.named_parameters())
        for fragment, value in zip(state[1].shard(), state[2].values, strict=True):
            assert torch.equal(parameters[fragment.name].detach().flatten(), value)


def test_exported_sums_are_sums(tmp_path, state):
    """Fault: a part's factor is ignored, or the sum is rounded to float32 after each part."""
    _, engine, ema = state
    saved = save(tmp_path, state, 80)
    path = tmp_path / "sum.safetensors"
    export_weights([(saved, "ema", 0.25), (saved, "master", 2.0)], path)
    parameters = dict(load_weights(path).network.named_parameters())
    for fragment, value in zip(engine.shard(), ema.values, strict=True):
        expected = (0.25 * value.double() + 2 * fragment.master.double()).float()
        assert torch.equal(parameters[fragment.name].detach().flatten(), expected)


def test_a_foreign_file_is_not_taken_for_weights(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_weights(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(tmp_path / "absent")


def test_a_flipped_bit_in_exported_weights_is_found(tmp_path, state):
    """Fault: 231 of 300 flipped bits load as other weights."""
    path = tmp_path / "ema.safetensors"
    export_weights([(save(tmp_path, state, 80), "ema", 1.0)], path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    chosen = random.Random(0)
    for byte in [*range(8), *chosen.sample(range(8, header), 60), *chosen.sample(range(header, len(data)), 20)]:
        flipped = bytearray(data)
        flipped[byte] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=str(path)):
            load_weights(path)


def test_weights_of_an_older_version_load_with_a_line(tmp_path, state, capsys):
    path = tmp_path / "ema.safetensors"
    export_weights([(save(tmp_path, state, 80), "ema", 1.0)], path)
    expected = load_weights(path).network.state_dict()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["sha256"]
    save_file(load_file(path), path, metadata)
    assert capsys.readouterr().err == ""
    loaded = load_weights(path).network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert "has no digest, since an older version wrote it" in capsys.readouterr().err
    save_file(load_file(path), path, metadata | {"shb256": "0" * 64})
    with pytest.raises(CheckpointError, match="not made by"):
        load_weights(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_weights(path)


def test_weights_of_a_kind_that_there_is_not_are_told_from_damage(tmp_path, state):
    """Fault: "no intact checkpoint" of checkpoints that are intact."""
    saved = save(tmp_path, state, 80)
    with pytest.raises(ConfigError, match=r"has no weights 'nothere'; it has ema, master$"):
        export_weights([(saved, "nothere", 1.0)], tmp_path / "none.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))
