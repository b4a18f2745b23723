"""Where checkpoints lie, which are kept, what is skipped, and what an outage of the store does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.checkpoints import Fixture
from tests.support.patience import until
from warm_dist.checkpoints import manager
from warm_dist.checkpoints.format import CHECKPOINTS, SNAPSHOTS, Saved, complete_names, name_of, nimg_of
from warm_dist.errors import CheckpointError, OutputError
from warm_dist.store.folder import FolderStore


def damage(run: Path, nimg: int, file: str = "rank_0.safetensors") -> None:
    path = run / name_of(CHECKPOINTS, nimg) / file
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)


def test_damaged_ones_are_passed_over_and_never_a_fresh_start(tmp_path, said):
    mine = Fixture(tmp_path, said, keep_last=3)
    assert mine.restore() is None
    for nimg in (8, 16, 24):
        mine.save(nimg)
    (tmp_path / name_of(CHECKPOINTS, 24) / "COMPLETE").unlink()  # killed before the end of a save
    damage(tmp_path, 16)
    assert mine.restore() == 8
    assert [text for text in said if "damaged checkpoint skipped" in text and "000016" in text and "differs" in text]
    assert not [text for text in said if "000024" in text]  # it never was a checkpoint
    damage(tmp_path, 8, "rank_0.done")
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        mine.restore()


def test_the_last_checkpoint_of_a_run_on_a_new_machine_is_the_store_s(tmp_path, said):
    """Fault: a finished run on a new machine whose last checkpoint is looked for only in the empty local folder."""
    first = Fixture(tmp_path / "machine1", said, url=str(tmp_path / "there"))
    first.save(8)
    assert first.storage.saved(8).store is first.storage.local
    assert first.storage.close(60) == []
    second = Fixture(tmp_path / "machine2", said, url=str(tmp_path / "there"))
    assert second.restore() == 8  # nothing is left to train, and its weights are to be written
    assert second.storage.saved(8).store is second.storage.remote
    second.save(16)
    assert second.storage.saved(16).store is second.storage.local
    assert second.storage.close(60) == []


def test_one_of_an_unknown_format_is_never_a_fresh_start(tmp_path, said):
    folder = tmp_path / name_of(CHECKPOINTS, 8)
    folder.mkdir(parents=True)
    (folder / "COMPLETE").write_text(json.dumps({"format": 1, "nimg": 8}))
    with pytest.raises(CheckpointError, match="of format 1, this version reads formats 2 and 3"):
        Fixture(tmp_path, said).restore()


def test_a_refusal_is_not_passed_over(tmp_path, said):
    """Fault: a refused checkpoint counts as damaged, so that the run goes on from an older one or from nothing."""
    mine = Fixture(tmp_path, said)
    mine.save(8)

    def refuse(saved: Saved) -> None:
        raise CheckpointError("made from other data")

    with pytest.raises(CheckpointError, match="made from other data"):
        mine.storage.restore(refuse, lambda saved: None)


def test_the_last_ones_multiples_and_snapshots_are_kept(tmp_path, said):
    mine = Fixture(tmp_path, said, keep_last=2, keep_every_nimg=32)
    for nimg in range(8, 81, 8):
        mine.save(nimg)
        mine.save(nimg, SNAPSHOTS)
    assert mine.names() == [32, 64, 72, 80]
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [f"{n:012d}" for n in mine.names()]
    assert mine.names(SNAPSHOTS) == list(range(8, 81, 8))


def test_what_a_killed_save_left_is_replaced_or_removed(tmp_path, said):
    mine = Fixture(tmp_path, said)
    for nimg in (8, 16):
        folder = tmp_path / name_of(CHECKPOINTS, nimg)
        folder.mkdir(parents=True)
        (folder / "rank_7.safetensors").write_bytes(b"left over")
    mine.save(16)
    mine.save(24)
    assert mine.names() == [16, 24]
    assert not list(tmp_path.glob("*/*/rank_7*"))
    assert not (tmp_path / name_of(CHECKPOINTS, 8)).exists()
    assert mine.restore() == 24


def test_what_is_removed_is_no_checkpoint_from_the_first_moment(tmp_path, said, monkeypatch):
    """Fault: COMPLETE is deleted last, so that a kill amid pruning leaves a checkpoint that lacks its tensors."""
    mine = Fixture(tmp_path / "run", said, keep_last=3)
    for nimg in (8, 16, 24):
        mine.save(nimg)
    mine.storage.config = mine.storage.config.model_copy(update={"keep_last": 1})
    mine.storage.remote = FolderStore(shutil.copytree(tmp_path / "run", tmp_path / "store"))
    deleted: list[str] = []
    monkeypatch.setattr(FolderStore, "delete", lambda store, path: deleted.append(path))
    mine.storage._prune_remote()
    assert [path.rpartition("/")[2] for path in deleted] == ["COMPLETE"] * 2 + ["rank_0.done", "rank_0.safetensors"] * 2
    removed: list[bool] = []
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: removed.append((folder / "COMPLETE").exists()))
    mine.storage._prune_local()
    assert removed == [False, False]


def test_a_disk_that_a_checkpoint_would_fill_is_told_of_before_it_is_written(tmp_path, said, monkeypatch):
    """Fault: a checkpoint is begun on a disk that cannot hold it and its small files, and fails in their midst."""
    mine = Fixture(tmp_path, said)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4))  # the tensor's own 4 bytes
    with pytest.raises(OutputError, match=r"4 bytes to write, 4 free; make room"):
        mine.save(8)
    assert not list(tmp_path.glob("*/*/rank_0.*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5))
    mine.save(8)
    assert mine.names() == [8]


def test_nothing_is_pruned_before_the_new_one_is_complete(tmp_path, said, monkeypatch):
    mine = Fixture(tmp_path, said, keep_last=1)
    mine.save(8)

    def full(*_: Any) -> None:
        raise OutputError("No space left on device")

    monkeypatch.setattr(manager, "write_rank", full)
    with pytest.raises(OutputError, match="checkpoint at nimg 16 not saved; rank 0: No space left"):
        mine.save(16)
    assert mine.names() == [8]
    assert mine.restore() == 8


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, said):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="cannot be made"):
        Fixture(tmp_path / "run", said)
    mine = Fixture(tmp_path / "other", said)
    (tmp_path / "other" / CHECKPOINTS).write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="cannot be made"):
        mine.save(8)


def test_a_store_gets_everything_and_a_fresh_machine_goes_on_from_it(tmp_path, said):
    url = str(tmp_path / "store")
    mine = Fixture(tmp_path / "run", said, url=url, keep_last=1, keep_every_nimg=16)
    assert mine.restore() is None
    for nimg in (8, 16, 24):
        mine.save(nimg)
        mine.save(nimg, SNAPSHOTS)
        until(lambda: not mine.storage.uploads.pending())
    assert mine.storage.close(60) == []
    store = FolderStore(Path(url))
    assert [nimg_of(name) for name in complete_names(store, CHECKPOINTS)] == [16, 24]
    assert [nimg_of(name) for name in complete_names(store, SNAPSHOTS)] == [8, 16, 24]
    assert {path.split("/")[0] for path in store.list()} == {CHECKPOINTS, SNAPSHOTS}
    fresh = Fixture(tmp_path / "another machine", said, url=url)
    assert fresh.restore() == 24
    assert fresh.storage.close(60) == []


def test_the_newest_of_folder_and_store_is_taken(tmp_path, said):
    url = str(tmp_path / "store")
    first = Fixture(tmp_path / "run", said, url=url)
    first.save(8)
    assert first.storage.close(60) == []
    second = Fixture(tmp_path / "run", said)  # without a store for a while
    second.save(16)
    third = Fixture(tmp_path / "run", said, url=url)
    assert third.restore() == 16
    until(lambda: not third.storage.uploads.pending())  # what had not been sent is sent now
    store = FolderStore(Path(url))
    assert [nimg_of(name) for name in complete_names(store, CHECKPOINTS)] == [8, 16]
    damage(tmp_path / "run", 16)
    assert third.restore() == 16  # the store's copy is as good
    assert any("damaged checkpoint skipped" in text for text in said)


def test_what_is_damaged_is_not_sent_to_the_store(tmp_path, said):
    url = str(tmp_path / "store")
    first = Fixture(tmp_path / "run", said, keep_last=3)
    for nimg in (8, 16, 24):
        first.save(nimg)
        first.save(nimg, SNAPSHOTS)
    damage(tmp_path / "run", 24)
    (tmp_path / "run" / name_of(CHECKPOINTS, 16) / "COMPLETE").write_text("{")
    (tmp_path / "run" / name_of(SNAPSHOTS, 16) / "COMPLETE").write_text("{")
    second = Fixture(tmp_path / "run", said, url=url, keep_last=3)
    assert second.restore() == 8
    assert second.storage.close(60) == []
    store = FolderStore(Path(url))
    assert [nimg_of(name) for name in complete_names(store, CHECKPOINTS)] == [8]
    assert [nimg_of(name) for name in complete_names(store, SNAPSHOTS)] == [8, 24]
    assert any("snapshot not sent" in text and "COMPLETE" in text for text in said)


def test_another_machine_goes_on_with_the_runs_history_and_back(tmp_path, said):
    """metrics.jsonl goes to the store with every checkpoint and comes back where it is missing or an older one."""
    from warm_dist.runs.metrics import MetricsLog, read_metrics

    url = str(tmp_path / "store")

    def machine(name: str, attempts: int) -> Fixture:
        there = Fixture(tmp_path / name, said, url=url)
        assert there.storage.attempts() == attempts
        return there

    def log(name: str, attempt: int, nimg: int) -> None:
        MetricsLog(tmp_path / name / "metrics.jsonl", attempt).write(nimg, "train", loss=1.0)

    def lines(name: str) -> list[tuple[int, int]]:
        return [(r["attempt"], r["nimg"]) for r in read_metrics(tmp_path / name / "metrics.jsonl")]

    first = machine("a", 0)
    log("a", 1, 8)
    first.save(8)
    assert first.storage.close(60) == []
    log("a", 1, 16)  # after the last checkpoint
    (tmp_path / "a" / "mirror.json").write_text("{}")
    machine("a", 1)
    assert lines("a") == [(1, 8), (1, 16)], "what is here is not replaced by less"

    second = machine("b", 1)
    assert lines("b") == [(1, 8)]
    assert second.restore() == 8
    log("b", 2, 16)
    second.save(16)
    assert second.storage.close(60) == []

    assert (tmp_path / "a" / "mirror.json").exists()
    machine("a", 2)
    assert lines("a") == [(1, 8), (2, 16)]
    assert not (tmp_path / "a" / "mirror.json").exists(), "it counted the bytes of the other file"
