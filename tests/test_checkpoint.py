from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.distributed.worker import config, info
from warm_dist import checkpoint
from warm_dist.config_file import dump
from warm_dist.distributed import World
from warm_dist.ema import EMA
from warm_dist.engine import LocalEngine
from warm_dist.errors import CheckpointError, OutputError
from warm_dist.generate import build_network, export_weights, load_weights

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def state(tmp_path: Path):
    settings = config(tmp_path, engine="local")
    engine = LocalEngine(build_network(settings), settings, ALONE)
    for k, f in enumerate(engine.owned()):
        f.exp_avg.fill_(k)
        f.exp_avg_sq.copy_(torch.arange(f.numel))
    ema = EMA(engine.owned(), 100, None)
    for value in ema.values:
        value.add_(1)
    return settings, engine, ema


def save(root: Path, state, nimg: int) -> Path:
    settings, engine, ema = state
    meta = {"config": dump(settings), "data": info().to_json()}
    return checkpoint.save(root, ALONE, engine, ema, nimg, nimg // 8, meta)


def test_round_trip_is_bit_exact(tmp_path, state):
    settings, engine, ema = state
    folder = save(tmp_path / "c", state, 80)
    other = LocalEngine(build_network(settings), settings, ALONE)
    shadow = EMA(other.owned(), 100, None)
    for f in other.owned():
        f.master.zero_()
    meta = checkpoint.inspect(folder)
    checkpoint.load(folder, meta, other, shadow)
    for a, b in zip(engine.owned(), other.owned(), strict=True):
        assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("master", "exp_avg", "exp_avg_sq"))
    assert all(torch.equal(a, b) for a, b in zip(ema.values, shadow.values, strict=True))
    assert {float(s["step"]) for s in other.optimizer.state.values()} == {10.0}


def test_no_pickle_and_complete_comes_last(tmp_path, state):
    folder = save(tmp_path / "c", state, 80)
    assert sorted(path.name for path in folder.iterdir()) == ["COMPLETE", "rank_0.done", "rank_0.safetensors"]
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert max(times, key=lambda name: times[name]) == "COMPLETE"


def test_damaged_ones_are_passed_over_and_never_a_fresh_start(tmp_path, state):
    root, warnings = tmp_path / "c", []
    assert checkpoint.latest(root, warnings.append) is None
    first, second, third = (save(root, state, nimg) for nimg in (80, 160, 240))
    (third / "COMPLETE").unlink()  # killed before the end of a save
    blob = bytearray((second / "rank_0.safetensors").read_bytes())
    blob[-1] ^= 1
    (second / "rank_0.safetensors").write_bytes(blob)
    found = checkpoint.latest(root, warnings.append)
    assert found is not None
    assert found[0] == first
    assert len(warnings) == 1
    assert "differs from what COMPLETE says" in warnings[0]
    (first / "rank_0.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        checkpoint.latest(root, warnings.append)


def test_a_half_written_one_is_replaced(tmp_path, state):
    folder = checkpoint.folder_of(tmp_path / "c", 80)
    folder.mkdir(parents=True)
    (folder / "rank_7.safetensors").write_bytes(b"left over")
    save(tmp_path / "c", state, 80)
    assert not (folder / "rank_7.safetensors").exists()
    checkpoint.inspect(folder)


def test_only_the_last_are_kept(tmp_path, state):
    folders = [save(tmp_path / "c", state, nimg) for nimg in (80, 160, 240)]
    checkpoint.prune(tmp_path / "c", 2)
    assert checkpoint.complete_folders(tmp_path / "c") == folders[1:]
    assert not folders[0].exists()


def test_a_checkpoint_of_another_network_is_refused(tmp_path, state):
    folder = save(tmp_path / "c", state, 80)
    wider = config(tmp_path, engine="local", network__channels=32)
    engine = LocalEngine(build_network(wider), wider, ALONE)
    with pytest.raises(CheckpointError, match="lacks"):
        checkpoint.load(folder, checkpoint.inspect(folder), engine, EMA(engine.owned(), 100, None))


def test_a_folder_that_cannot_be_written_is_an_error_without_complete(tmp_path, state):
    (tmp_path / "c").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="cannot be made"):
        save(tmp_path / "c", state, 80)


def test_exported_weights_load_without_anything_else(tmp_path, state):
    settings, engine, ema = state
    folder = save(tmp_path / "c", state, 80)
    for kind, values in (("ema", ema.values), ("master", [f.master for f in engine.owned()])):
        path = tmp_path / f"{kind}.safetensors"
        export_weights(folder, kind, path)
        network, loaded, data = load_weights(path)
        assert loaded == settings
        assert data.fingerprint == "synthetic"
        parameters = dict(network.named_parameters())
        for fragment, value in zip(engine.owned(), values, strict=True):
            assert torch.equal(parameters[fragment.name].detach().flatten(), value)
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["nimg"] == "80"
    assert not list(tmp_path.glob(".*.part"))


def test_a_foreign_file_is_not_taken_for_weights(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_weights(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a readable"):
        load_weights(tmp_path / "absent")
