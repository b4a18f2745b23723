"""Where checkpoints lie, which are kept, what is passed over, and what an outage of the store does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.worker import BATCH, batches, config, info
from warm_dist.checkpoints import manager
from warm_dist.checkpoints.format import (
    CHECKPOINTS,
    SNAPSHOTS,
    Saved,
    _pieces,
    complete_names,
    load_saved,
    name_of,
    nimg_of,
    open_saved,
)
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.config.run import CheckpointConfig
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World
from warm_dist.errors import (
    AccessError,
    BucketError,
    CheckpointError,
    ConfigError,
    OutputError,
    Stopped,
    UnreachableError,
)
from warm_dist.store.folder import FolderStore
from warm_dist.store.open import open_store
from warm_dist.store.seaweedfs import S3Server
from warm_dist.training.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"), None)
META = {"num_steps": 1, "config": {}, "data": {}, "fingerprint": "x"}


class Fixture:
    """A run's storage in a folder, with a store beside it if `url` is given, and a state of one number."""

    def __init__(self, run: Path, said: list[str], **settings: Any) -> None:
        self.said = said
        self.storage = CheckpointManager(run, ALONE, CheckpointConfig(**settings), said.append)
        self.loaded: list[int] = []

    def save(self, nimg: int, group: str = CHECKPOINTS) -> None:
        self.storage.save(group, nimg, {"master/w@0": torch.tensor([float(nimg)])}, META)

    def restore(self) -> int | None:
        """The nimg of what was restored, read as `Trainer` would."""

        def load(saved: Saved) -> None:
            for file in saved.meta["files"]:
                for tensor, values in _pieces(saved, [file], lambda *_: True):
                    assert (tensor.kind, values.item()) == ("master", saved.meta["nimg"])

        saved = self.storage.restore(lambda saved: None, load)
        return None if saved is None else saved.meta["nimg"]

    def names(self, group: str = CHECKPOINTS) -> list[int]:
        return [nimg_of(name) for name in complete_names(self.storage.local, group)]


@pytest.fixture
def said() -> list[str]:
    return []


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
    assert [text for text in said if "passed over" in text and "000016" in text and "differs" in text]
    assert not [text for text in said if "000024" in text]  # it never was a checkpoint
    damage(tmp_path, 8, "rank_0.done")
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        mine.restore()


def test_the_last_checkpoint_of_a_run_on_a_new_machine_is_the_store_s(tmp_path, said):
    first = Fixture(tmp_path / "machine1", said, url=str(tmp_path / "there"))
    first.save(8)
    assert first.storage.saved(8).store is first.storage.local
    assert first.storage.close(30) == []
    second = Fixture(tmp_path / "machine2", said, url=str(tmp_path / "there"))
    assert second.restore() == 8  # nothing is left to train, and its weights are to be written
    assert second.storage.saved(8).store is second.storage.remote
    second.save(16)
    assert second.storage.saved(16).store is second.storage.local
    assert second.storage.close(30) == []


def test_one_of_an_unknown_format_is_never_a_fresh_start(tmp_path, said):
    folder = tmp_path / name_of(CHECKPOINTS, 8)
    folder.mkdir(parents=True)
    (folder / "COMPLETE").write_text(json.dumps({"format": 1, "nimg": 8}))
    with pytest.raises(CheckpointError, match="of format 1, this version reads format 2"):
        Fixture(tmp_path, said).restore()


def test_a_refusal_is_not_passed_over(tmp_path, said):
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


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_store_gets_everything_and_a_fresh_machine_goes_on_from_it(tmp_path, said):
    url = str(tmp_path / "store")
    mine = Fixture(tmp_path / "run", said, url=url, keep_last=1, keep_every_nimg=16)
    assert mine.restore() is None
    for nimg in (8, 16, 24):
        mine.save(nimg)
        mine.save(nimg, SNAPSHOTS)
        until(lambda: not mine.storage.uploads.pending())
    assert mine.storage.close(5) == []
    store = FolderStore(Path(url))
    assert [nimg_of(name) for name in complete_names(store, CHECKPOINTS)] == [16, 24]
    assert [nimg_of(name) for name in complete_names(store, SNAPSHOTS)] == [8, 16, 24]
    assert {path.split("/")[0] for path in store.list()} == {CHECKPOINTS, SNAPSHOTS}
    fresh = Fixture(tmp_path / "another machine", said, url=url)
    assert fresh.restore() == 24
    assert fresh.storage.close(5) == []


def test_the_newest_of_folder_and_store_is_taken(tmp_path, said):
    url = str(tmp_path / "store")
    first = Fixture(tmp_path / "run", said, url=url)
    first.save(8)
    assert first.storage.close(5) == []
    second = Fixture(tmp_path / "run", said)  # without a store for a while
    second.save(16)
    third = Fixture(tmp_path / "run", said, url=url)
    assert third.restore() == 16
    until(lambda: not third.storage.uploads.pending())  # what had not been sent is sent now
    store = FolderStore(Path(url))
    assert [nimg_of(name) for name in complete_names(store, CHECKPOINTS)] == [8, 16]
    damage(tmp_path / "run", 16)
    assert third.restore() == 16  # the store's copy is as good
    assert any("passed over" in text for text in said)


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
    assert second.storage.close(5) == []
    store = FolderStore(Path(url))
    assert [nimg_of(name) for name in complete_names(store, CHECKPOINTS)] == [8]
    assert [nimg_of(name) for name in complete_names(store, SNAPSHOTS)] == [8, 24]
    assert any("snapshot not sent" in text and "COMPLETE" in text for text in said)


class Slow(FolderStore):
    """A store that answers when it is let, and can be down."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.down = self.refuses = False

    def upload(self, path: str, local_file: Path) -> None:
        self.gate.wait(30)
        if self.down:
            raise UnreachableError("the store does not answer")
        if self.refuses:
            raise AccessError("the store refuses these credentials")
        super().upload(path, local_file)


@pytest.fixture
def slow(tmp_path, said) -> tuple[Fixture, Slow]:
    remote = Slow(tmp_path / "store")
    mine = Fixture(tmp_path / "run", said, keep_last=1)
    mine.storage.remote = remote
    mine.storage.uploads = manager.Uploads(remote, mine.storage._prune_remote)
    return mine, remote


def test_a_slow_store_gets_the_oldest_and_the_newest(slow):
    mine, remote = slow
    for nimg in range(8, 57, 8):
        mine.save(nimg)
    waiting = mine.storage.uploads.pending()
    assert {nimg_of(name) for name in waiting} >= {8, 56}
    assert mine.names() == [8, 16, 24, 32, 40, 48, 56]  # nothing is removed that is to be sent, or may just be
    remote.gate.set()
    assert mine.storage.close(10) == []
    assert [nimg_of(name) for name in complete_names(remote, CHECKPOINTS)] == [56]


def test_uploads_that_are_given_up_free_their_files(slow):
    mine, remote = slow
    for nimg in (8, 16, 24, 32):
        mine.save(nimg)
    remote.gate.set()
    until(lambda: not mine.storage.uploads.pending())
    ended = mine.storage.ended()
    assert [upload.name[-2:] for upload in ended if upload.error] == ["16", "24"]
    assert all("a newer one takes its place" in upload.error for upload in ended if upload.error)
    mine.save(40)
    assert mine.names() == [40]


def test_snapshots_are_never_given_up(slow):
    mine, remote = slow
    remote.down = True
    remote.gate.set()
    for nimg in range(8, 49, 8):
        mine.save(nimg, SNAPSHOTS)
        mine.save(nimg)
    remote.down = False
    assert mine.storage.close(30) == []
    assert [nimg_of(name) for name in complete_names(remote, SNAPSHOTS)] == list(range(8, 49, 8))


def test_a_store_that_refuses_is_told_and_the_next_is_tried(slow):
    mine, remote = slow
    remote.refuses = True
    remote.gate.set()
    mine.save(8)
    until(lambda: not mine.storage.uploads.pending())
    assert "refuses" in mine.storage.ended()[0].error
    remote.refuses = False
    mine.save(16)
    assert mine.storage.close(10) == []
    assert [nimg_of(name) for name in complete_names(remote, CHECKPOINTS)] == [16]


def test_what_has_arrived_is_not_called_failed_though_it_be_given_up_while_tidying(slow, monkeypatch):
    mine, remote = slow
    remote.gate.set()
    uploads = mine.storage.uploads

    def tidy() -> None:
        uploads.drop(uploads.pending())
        raise UnreachableError("the store does not answer")

    monkeypatch.setattr(uploads, "after", tidy)
    mine.save(8)
    until(lambda: not uploads.pending())
    assert [upload.error for upload in mine.storage.ended()] == [None]
    assert [nimg_of(name) for name in complete_names(remote, CHECKPOINTS)] == [8]


def test_a_store_that_stays_away_is_reported_at_the_end(slow):
    mine, remote = slow
    remote.down = True
    remote.gate.set()
    mine.save(8)
    begun = time.monotonic()
    late = mine.storage.close(1)
    assert time.monotonic() - begun < 3
    assert [upload.name for upload in late] == [name_of(CHECKPOINTS, 8)]
    assert "not through after 1 s; the store does not answer" in late[0].error


@pytest.mark.slow
def test_a_bad_store_is_one_error_before_any_training(s3, tmp_path, said, monkeypatch):
    for url, error in (("s3://absent/a", BucketError), ("s3://your-bucket/a", ConfigError)):
        with pytest.raises(error):
            Fixture(tmp_path / "run", said, url=url, endpoint_url=s3.endpoint_url).restore()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessError):
        Fixture(tmp_path / "run", said, url="s3://warm-dist/a", endpoint_url=s3.endpoint_url).restore()


@pytest.mark.slow
@pytest.mark.parametrize("outage_s", [4, pytest.param(60, marks=pytest.mark.soak)])
def test_s3_down_during_a_checkpoint(tmp_path, said, monkeypatch, outage_s):
    """The server ends in mid-run and comes back: training goes on meanwhile, the checkpoint arrives, nothing is corrupt."""
    folder = tmp_path / "s3"
    with S3Server(folder, "warm-dist") as server:
        port = int(server.endpoint_url.rpartition(":")[2])
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        settings = config(
            tmp_path / "run", engine="local", train__total_nimg=BATCH * 100_000, train__save_nimg=BATCH * 10,
            checkpoint__url="s3://warm-dist/run", checkpoint__endpoint_url=server.endpoint_url,
        )  # fmt: skip
        place = CheckpointManager(tmp_path / "run", ALONE, settings.checkpoint, said.append)
        trainer = Trainer(settings, ALONE, info(), said.append, place)
        trainer.restore()
        stop, down, marks = StopSignal(), [True], {}
        step, begun = trainer.step, []

        def watched(data: Any) -> Any:
            if trainer.nimg == BATCH * 15:  # the first checkpoint is sent, the second is to come
                until(lambda: not place.uploads.pending())
                server.__exit__()
                begun.append(time.monotonic())
            if begun and down and time.monotonic() > begun[0] + outage_s:
                marks["back"] = trainer.nimg
                down.clear()
                again = S3Server(folder, "warm-dist", port).__enter__()
                server._stack = again._stack  # to be closed by the with above
            if not down and trainer.nimg == trainer.saved_nimg + BATCH * 5 and "end" not in marks:
                until(lambda: not place.uploads.pending())
                marks["end"] = trainer.saved_nimg
                stop.name = "TEST"
            return step(data)

        trainer.step = watched  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            trainer.fit(batches(ALONE, 0), None, stop, None, set())
        assert marks["back"] > BATCH * 15 + 1  # it went on while there was no server
        assert place.close(20) == []
        store = open_store("s3://warm-dist/run", server.endpoint_url)
        names = complete_names(store, CHECKPOINTS)
        assert nimg_of(names[-1]) == trainer.nimg
        fresh = CheckpointManager(tmp_path / "fresh", ALONE, settings.checkpoint, said.append)
        other = Trainer(settings, ALONE, info(), said.append, fresh)
        other.restore()
        assert other.nimg == trainer.nimg
        for a, b in zip(trainer.engine.owned(), other.engine.owned(), strict=True):
            assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("master", "exp_avg", "exp_avg_sq"))
        for name in names:  # whatever is complete is whole
            load_saved(open_saved(store, name), 0, other.engine, other.emas)
        assert fresh.close(5) == []


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
    assert first.storage.close(20) == []
    log("a", 1, 16)  # after the last checkpoint
    (tmp_path / "a" / "mirror.json").write_text("{}")
    machine("a", 1)
    assert lines("a") == [(1, 8), (1, 16)], "what is here is not replaced by less"

    second = machine("b", 1)
    assert lines("b") == [(1, 8)]
    assert second.restore() == 8
    log("b", 2, 16)
    second.save(16)
    assert second.storage.close(20) == []

    assert (tmp_path / "a" / "mirror.json").exists()
    machine("a", 2)
    assert lines("a") == [(1, 8), (2, 16)]
    assert not (tmp_path / "a" / "mirror.json").exists(), "it counted the bytes of the other file"


def test_a_log_that_grows_or_is_refused_fails_no_checkpoint(tmp_path, said, s3, monkeypatch):
    from warm_dist.runs.metrics import MetricsLog

    mine = Fixture(tmp_path / "run", said, url=f"s3://{s3.bucket}/{tmp_path.name}", endpoint_url=s3.endpoint_url)
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl", 1)
    log.write(8, "train", loss=1.0)
    write = type(mine.storage.remote).write

    def grows(store, path, data):
        if path == manager.METRICS:
            log.write(16, "train", loss=1.0)
        write(store, path, data)

    monkeypatch.setattr(type(mine.storage.remote), "write", grows)
    mine.save(8)
    deadline = time.monotonic() + 20
    while mine.storage.uploads.pending() and time.monotonic() < deadline:
        time.sleep(0.02)

    def refused(store, path, data):
        if path == manager.METRICS:
            raise AccessError("not this one")
        write(store, path, data)

    monkeypatch.setattr(type(mine.storage.remote), "write", refused)
    mine.save(16)
    assert mine.storage.close(20) == []
    assert [upload.error for upload in mine.storage.ended()] == [None, None]
    assert said == ["metrics.jsonl not sent: not this one"]
