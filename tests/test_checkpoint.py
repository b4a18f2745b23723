"""The format: what is written is read, by whom it may be, and anything else is noticed."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.distributed.worker import config, info
from warm_dist.checkpoints import format
from warm_dist.checkpoints.format import CHECKPOINTS, Saved, load_saved, open_saved, write_rank
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.checkpoints.weights import export_weights, load_weights
from warm_dist.config.load import dump
from warm_dist.distributed.world import World
from warm_dist.errors import CheckpointError
from warm_dist.networks.unet import build_network
from warm_dist.store.folder import FolderStore
from warm_dist.training.ema import EMA, half_life
from warm_dist.training.engine import LocalEngine
from warm_dist.training.state import tensors_of

ALONE = World(0, 1, torch.device("cpu"), None)


def ema_of(engine: LocalEngine) -> EMA:
    return EMA(engine.owned(), partial(half_life, 100, None))


@pytest.fixture
def state(tmp_path: Path):
    settings = config(tmp_path, engine="local")
    engine = LocalEngine(build_network(settings), settings, ALONE)
    for k, f in enumerate(engine.owned()):
        f.exp_avg.fill_(k)
        f.exp_avg_sq.copy_(torch.arange(f.numel))
    ema = ema_of(engine)
    for value in ema.values:
        value.add_(1)
    return settings, engine, ema


def save(run: Path, state, nimg: int) -> Saved:
    settings, engine, ema = state
    storage = CheckpointManager(run, ALONE, lambda url, endpoint: FolderStore(Path(url)), settings.checkpoint, print)
    meta = {"num_steps": nimg // 8, "config": dump(settings), "data": info().to_json(), "fingerprint": "x"}
    storage.save(CHECKPOINTS, nimg, tensors_of(engine, {"ema": ema}), meta)
    return storage.saved(nimg)


def test_round_trip_is_bit_exact(tmp_path, state):
    settings, engine, ema = state
    saved = save(tmp_path, state, 80)
    other = LocalEngine(build_network(settings), settings, ALONE)
    shadow = ema_of(other)
    for f in other.owned():
        f.master.zero_()
    load_saved(saved, 0, other, {"ema": shadow})
    for a, b in zip(engine.owned(), other.owned(), strict=True):
        assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("master", "exp_avg", "exp_avg_sq"))
    assert all(torch.equal(a, b) for a, b in zip(ema.values, shadow.values, strict=True))
    assert {float(s["step"]) for s in other.optimizer.state.values()} == {10.0}


def test_any_safetensors_reader_understands_it(tmp_path, state):
    _, engine, _ = state
    save(tmp_path, state, 80)
    with safe_open(tmp_path / "checkpoints" / f"{80:012d}" / "rank_0.safetensors", framework="pt") as file:
        for f in engine.owned():
            assert torch.equal(file.get_tensor(f"master/{f.name}@{f.start}"), f.master)
        assert len(list(file.keys())) == 4 * len(engine.owned())


def test_no_pickle_and_complete_comes_last(tmp_path, state):
    save(tmp_path, state, 80)
    folder = tmp_path / "checkpoints" / f"{80:012d}"
    assert sorted(path.name for path in folder.iterdir()) == ["COMPLETE", "rank_0.done", "rank_0.safetensors"]
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert max(times, key=lambda name: times[name]) == "COMPLETE"


@pytest.mark.parametrize("reads", [1, 7, 1 << 30], ids=["one tensor a read", "few", "whole files"])
def test_parts_that_ranks_wrote_are_put_together_by_readers_of_another_number(tmp_path, state, monkeypatch, reads):
    """Three writers cut every parameter at odd places; one reader, whose own file is only the first, gets all of it."""
    settings, engine, ema = state
    monkeypatch.setattr(format, "_GET_BYTES", reads * 4096)
    whole = tensors_of(engine, {"ema": ema})
    lines = []
    for rank in range(3):
        share = {}
        for key, tensor in whole.items():
            cut = [0, tensor.numel() // 3, tensor.numel() // 2 + 1, tensor.numel()]
            if cut[rank] < cut[rank + 1]:
                share[key.replace("@0", f"@{cut[rank]}")] = tensor[cut[rank] : cut[rank + 1]]
        lines.append(write_rank(tmp_path, rank, share))
    saved = Saved(FolderStore(tmp_path.parent), tmp_path.name, {"files": lines, "num_steps": 10})
    other = LocalEngine(build_network(settings), settings, ALONE)
    shadow = ema_of(other)
    load_saved(saved, 1, other, {"ema": shadow})
    read = tensors_of(other, {"ema": shadow})
    assert all(torch.equal(tensor, read[key]) for key, tensor in whole.items())


def test_a_rank_reads_no_file_but_its_own_if_that_holds_everything(tmp_path, state):
    _, engine, ema = state
    whole = tensors_of(engine, {"ema": ema})
    lines = [write_rank(tmp_path, rank, whole) for rank in range(2)]
    (tmp_path / "rank_0.safetensors").unlink()
    (tmp_path / "rank_0.done").unlink()
    saved = Saved(FolderStore(tmp_path.parent), tmp_path.name, {"files": lines, "num_steps": 1})
    load_saved(saved, 1, engine, {"ema": ema})
    with pytest.raises(CheckpointError, match=r"rank_0\.done"):
        load_saved(saved, 0, engine, {"ema": ema})


@pytest.mark.parametrize("victim", ["rank_0.safetensors", "rank_0.done"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed(tmp_path, state, victim, damage):
    _, engine, ema = state
    saved = save(tmp_path, state, 80)
    path = tmp_path / "checkpoints" / f"{80:012d}" / victim
    blob = bytearray(path.read_bytes())
    if damage == "flip":
        blob[-9] ^= 1
        path.write_bytes(blob)
    elif damage == "cut":
        path.write_bytes(blob[:-5])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=victim):
        load_saved(saved, 0, engine, {"ema": ema})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2, "nimg": 80}'])
def test_a_complete_that_says_too_little_is_refused(tmp_path, state, text):
    saved = save(tmp_path, state, 80)
    (tmp_path / saved.name / "COMPLETE").write_text(text)
    with pytest.raises(CheckpointError, match="COMPLETE"):
        open_saved(saved.store, saved.name)


def test_a_checkpoint_of_another_network_is_refused(tmp_path, state):
    saved = save(tmp_path, state, 80)
    wider = config(tmp_path, engine="local", network__channels=32)
    engine = LocalEngine(build_network(wider), wider, ALONE)
    with pytest.raises(CheckpointError, match="lacks"):
        load_saved(saved, 0, engine, {"ema": ema_of(engine)})


def test_exported_weights_load_without_anything_else(tmp_path, state):
    settings, engine, ema = state
    saved = save(tmp_path, state, 80)
    for kind, values in (("ema", ema.values), ("master", [f.master for f in engine.owned()])):
        path = tmp_path / f"{kind}.safetensors"
        export_weights([(saved, kind, 1.0)], path)
        network, loaded, data = load_weights(path)
        assert loaded == settings
        assert data.fingerprint == "synthetic"
        parameters = dict(network.named_parameters())
        for fragment, value in zip(engine.owned(), values, strict=True):
            assert torch.equal(parameters[fragment.name].detach().flatten(), value)
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["nimg"] == "80"
    assert not list(tmp_path.glob(".*.part"))


def test_exported_sums_are_sums(tmp_path, state):
    _, engine, ema = state
    saved = save(tmp_path, state, 80)
    path = tmp_path / "sum.safetensors"
    export_weights([(saved, "ema", 0.25), (saved, "master", 2.0)], path)
    parameters = dict(load_weights(path).network.named_parameters())
    for fragment, value in zip(engine.owned(), ema.values, strict=True):
        expected = (0.25 * value.double() + 2 * fragment.master.double()).float()
        assert torch.equal(parameters[fragment.name].detach().flatten(), expected)


def test_a_foreign_file_is_not_taken_for_weights(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_weights(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a readable"):
        load_weights(tmp_path / "absent")
