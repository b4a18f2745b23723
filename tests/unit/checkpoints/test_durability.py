"""A power cut: what a save has promised is on the disk before anything older goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import Fixture
from tests.support.disk import Recorder
from tests.support.paths import ROOT
from warm_dist import records
from warm_dist.checkpoints.format import CHECKPOINTS, name_of
from warm_dist.config.run import load_config
from warm_dist.files import replace_file, write_json
from warm_dist.runs import folder
from warm_dist.runs.folder import Claim, describe_run, write_end
from warm_dist.runs.metrics import MetricsLog
from warm_dist.store.folder import FolderStore


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(
    tmp_path: Path, said: list[str], monkeypatch: Any
) -> None:
    """Fault: nothing of a checkpoint is synced, so that a power cut leaves every kept one empty."""
    run = tmp_path / "new" / "run"
    mine = Fixture(run, said, keep_last=1)
    mine.save(8)
    disk = Recorder(monkeypatch)
    mine.save(16)
    new, old = run / name_of(CHECKPOINTS, 16), run / name_of(CHECKPOINTS, 8)
    made, weights = disk.first("sync", new.parent), disk.first("sync", new / "rank_0.safetensors")
    done, complete = disk.durable_from(new / "rank_0.done"), disk.durable_from(new / "COMPLETE")
    assert max(made, weights) < done < disk.first("rename", new / "COMPLETE") < complete
    removed = [number for number, (what, path) in enumerate(disk.calls) if what == "remove" and old in path.parents]
    assert disk.calls[removed[0]] == ("remove", old / "COMPLETE"), "COMPLETE first: no half-removed one is ever taken"
    assert complete < removed[0]


def test_a_new_run_s_folders_are_on_the_disk(tmp_path: Path, said: list[str], monkeypatch: Any) -> None:
    disk = Recorder(monkeypatch)
    Fixture(tmp_path / "new" / "run", said).save(8)
    for made in ("", "new", "new/run", "new/run/checkpoints"):
        assert ("sync", tmp_path / made) in disk.calls


def a_run(path: Path) -> None:
    describe_run(path, load_config(ROOT / "configs" / "quickstart.json"), 1, {})


WRITERS = {
    "config.json": a_run,
    "run.json": a_run,
    "exit.json": lambda path: write_end(path, 1, 8, None),
    "a.json": lambda path: write_json(path / "a.json", {}),
    "a.record": lambda path: records.write_record(path / "a.record", {}),
    "a.png": lambda path: replace_file(path / "a.png", lambda temporary: temporary.write_bytes(b"1")),
    "shard.tar": lambda path: FolderStore(path).write("shard.tar", b"1"),
    "sub/shard.tar": lambda path: FolderStore(path).upload("sub/shard.tar", Path(__file__)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_replaced_is_durable(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(folder, "git_commit", lambda: "c0ffee")
    disk = Recorder(monkeypatch)
    WRITERS[name](tmp_path)
    disk.durable_from(tmp_path / name)
    assert "/" not in name or ("sync", tmp_path) in disk.calls


def test_the_log_is_on_the_disk_when_asked(tmp_path: Path, monkeypatch: Any) -> None:
    disk = Recorder(monkeypatch)
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    log.begin()
    disk.calls.clear()
    log.write(8, "train", loss=1.0)
    assert disk.calls == [], "a line is not worth a wait for the disk"
    log.sync()
    assert disk.calls == [("sync", tmp_path / "metrics.jsonl"), ("sync", tmp_path)]


def test_the_end_has_its_space_from_the_start(tmp_path: Path, monkeypatch: Any) -> None:
    """Fault: exit.json is not written on the very disk that was full."""
    claim = Claim.take(tmp_path)
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    (kept,) = tmp_path.glob(".exit.*")
    assert kept.stat().st_blocks * 512 >= 16 << 10
    claim.end(1, 8, RuntimeError("x" * 100_000 + "\u2028"))
    monkeypatch.setattr(Path, "write_bytes", real)
    end = folder.read_end(tmp_path)
    assert end is not None
    assert end.code == 1
    claim.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "exit.json"]
