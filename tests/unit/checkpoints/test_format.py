"""The format: what is written is read, by whom it may be, and anything else is noticed."""

import pytest
import torch
from safetensors import safe_open

from tests.support.saved_state import ema_of, save
from tests.support.tiny_run import ALONE, config
from warm_dist.checkpoints import format
from warm_dist.checkpoints.format import FORMAT, Saved, open_saved, write_rank
from warm_dist.errors import CheckpointError
from warm_dist.networks.unet import build_network
from warm_dist.store.folder import FolderStore
from warm_dist.training.engine import LocalEngine
from warm_dist.training.state import load_state, state_tensors


def test_round_trip_is_bit_exact(tmp_path, state):
    settings, engine, ema = state
    saved = save(tmp_path, state, 80)
    other = LocalEngine(build_network(settings), settings, ALONE)
    shadow = ema_of(other)
    for f in other.shard():
        f.master.zero_()
    load_state(saved, 0, other, {"ema": shadow})
    for a, b in zip(engine.shard(), other.shard(), strict=True):
        assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("master", "exp_avg", "exp_avg_sq"))
    assert all(torch.equal(a, b) for a, b in zip(ema.values, shadow.values, strict=True))
    assert {float(s["step"]) for s in other.optimizer.state.values()} == {10.0}


def test_any_safetensors_reader_understands_it(tmp_path, state):
    _, engine, _ = state
    save(tmp_path, state, 80)
    with safe_open(tmp_path / "checkpoints" / f"{80:012d}" / "rank_0.safetensors", framework="pt") as file:
        for f in engine.shard():
            assert torch.equal(file.get_tensor(f"master/{f.name}@{f.start}"), f.master)
        assert len(list(file.keys())) == 4 * len(engine.shard())


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
    whole = state_tensors(engine, {"ema": ema})
    lines = []
    for rank in range(3):
        share = {}
        for key, tensor in whole.items():
            cut = [0, tensor.numel() // 3, tensor.numel() // 2 + 1, tensor.numel()]
            if cut[rank] < cut[rank + 1]:
                share[key.replace("@0", f"@{cut[rank]}")] = tensor[cut[rank] : cut[rank + 1]]
        lines.append(write_rank(tmp_path, rank, share))
    saved = Saved(FolderStore(tmp_path.parent), tmp_path.name, {"files": lines, "num_steps": 10, "format": FORMAT})
    other = LocalEngine(build_network(settings), settings, ALONE)
    shadow = ema_of(other)
    load_state(saved, 1, other, {"ema": shadow})
    read = state_tensors(other, {"ema": shadow})
    assert all(torch.equal(tensor, read[key]) for key, tensor in whole.items())


def test_a_rank_reads_no_file_but_its_own_if_that_holds_everything(tmp_path, state):
    _, engine, ema = state
    whole = state_tensors(engine, {"ema": ema})
    lines = [write_rank(tmp_path, rank, whole) for rank in range(2)]
    (tmp_path / "rank_0.safetensors").unlink()
    (tmp_path / "rank_0.done").unlink()
    saved = Saved(FolderStore(tmp_path.parent), tmp_path.name, {"files": lines, "num_steps": 1, "format": FORMAT})
    load_state(saved, 1, engine, {"ema": ema})
    with pytest.raises(CheckpointError, match=r"rank_0\.done"):
        load_state(saved, 0, engine, {"ema": ema})


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
        load_state(saved, 0, engine, {"ema": ema})


def test_an_intact_file_of_another_attempt_is_noticed(tmp_path, state):
    """Fault: what a rank wrote before it was killed at the same nimg is taken for its part of this checkpoint."""
    _, engine, ema = state
    saved = save(tmp_path, state, 80)
    folder = tmp_path / "checkpoints" / f"{80:012d}"
    ema.values[0].add_(1)
    write_rank(folder, 0, state_tensors(engine, {"ema": ema}))
    with pytest.raises(CheckpointError, match=r"rank_0\.done: differs from what COMPLETE says"):
        load_state(saved, 0, engine, {"ema": ema})


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
        load_state(saved, 0, engine, {"ema": ema_of(engine)})
