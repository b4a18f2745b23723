"""Uploads to a store that is slow, refuses, or stays away."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import Fixture
from tests.support.patience import until
from warm_dist.checkpoints import manager
from warm_dist.checkpoints.format import CHECKPOINTS, SNAPSHOTS, complete_names, name_of, nimg_of, write_rank
from warm_dist.errors import AccessError, UnreachableError
from warm_dist.store.folder import FolderStore


class Slow(FolderStore):
    """A store that answers when it is let, and can be down."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.down = self.refuses = False
        self.tries = 0

    def upload(self, path: str, local_file: Path) -> None:
        self.gate.wait(30)
        self.tries += 1
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
    """Fault: a checkpoint is pruned while its upload waits, or every one that waits is sent, old ones first."""
    mine, remote = slow
    for nimg in range(8, 57, 8):
        mine.save(nimg)
    waiting = mine.storage.uploads.pending()
    assert {nimg_of(name) for name in waiting} >= {8, 56}
    assert mine.names() == [8, 56], "one is being sent and one waits; what is not to be sent does not stay"
    remote.gate.set()
    assert mine.storage.close(60) == []
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
    assert mine.storage.close(60) == []
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
    assert mine.storage.close(60) == []
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
    until(lambda: remote.tries > 1)  # the first has failed
    late = mine.storage.close(0.05)
    assert [upload.name for upload in late] == [name_of(CHECKPOINTS, 8)]
    assert "not finished after 0 s; the store does not answer" in late[0].error


class Asked(FolderStore):
    """Counts how often it was asked for rank 1's record."""

    times = 0

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        self.times += path.endswith("rank_1.done")
        return super().read(path, start, length, etag)


def test_a_checkpoint_in_the_store_is_complete_when_every_rank_s_files_are_there(tmp_path):
    """Not before, and not with what an earlier attempt at the same nimg left there."""
    store, name = Asked(tmp_path / "store"), name_of(CHECKPOINTS, 8)
    tensors = {"master/w@0": torch.tensor([1.0])}
    lines = [write_rank(tmp_path, rank, tensors) for rank in range(2)]
    mine = [tmp_path / file for file in ("rank_0.safetensors", "rank_0.done")]
    uploads = manager.Uploads(store, lambda: None)
    uploads.add(manager.Upload(name, mine, {"files": lines}, droppable=True))
    for record in (None, b"of an earlier attempt"):
        if record:
            store.write(f"{name}/rank_1.done", record)
        asked = store.times
        until(lambda asked=asked: store.times > asked + 1 or not uploads.pending())
        assert complete_names(store, CHECKPOINTS) == []
    store.upload(f"{name}/rank_1.done", tmp_path / "rank_1.done")
    assert uploads.close(60) == []
    assert complete_names(store, CHECKPOINTS) == [name]
