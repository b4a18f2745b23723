"""Two packings on one folder: parts of one join, another is refused, and what a killed one left holds nothing."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from data_pipelines.pack import Packing
from data_pipelines.shards import owner
from data_pipelines.shards.owner import owned
from tests.support.packing import contents, noise_source
from warm_dist.errors import OutputError
from warm_dist.store.folder import FolderStore


def test_another_recipe_is_refused_and_parts_of_the_same_join(tmp_path: Path) -> None:
    """Fault: both write, and the manifest of one names shards that the other deleted."""
    store = FolderStore(tmp_path / "out")
    with owned(store, "one"), owned(store, "one"):
        with (
            pytest.raises(OutputError, match=r"out: another packing \(recipe one, process \d+ on .+\) is writing here"),
            owned(store, "two"),
        ):
            pass
        with owned(store, "one"):
            pass
    with owned(store, "two", alone=True):
        pass
    assert list(contents(tmp_path / "out")) == [".packing.lock"]


def test_what_a_killed_packing_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".packing.one.part.0123").write_text("process 1 on nowhere")
    with owned(FolderStore(tmp_path), "two"):
        assert not (tmp_path / ".packing.one.part.0123").exists()


def test_the_end_waits_for_the_parts_and_parts_wait_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the manifest is written while a part still writes shards."""
    store, order = FolderStore(tmp_path), list[str]()
    monkeypatch.setattr(owner, "_POLL_S", 0.01)
    waiting = threading.Event()
    monkeypatch.setattr(owner.time, "sleep", lambda seconds: waiting.set())

    def finish() -> None:
        with owned(store, "one", alone=True):
            order.append("end")

    thread = threading.Thread(target=finish)
    with owned(store, "one"):
        thread.start()
        assert waiting.wait(10)
        order.append("part")
    thread.join()
    assert order == ["part", "end"]


def test_a_packing_holds_its_folder_while_it_writes(tmp_path: Path) -> None:
    other = Packing(noise_source(4), str(tmp_path), shard_size=2, payload="webp")
    packing = Packing(noise_source(4), str(tmp_path), shard_size=2)

    def intrude(count: int) -> None:
        with pytest.raises(OutputError, match="another packing"):
            other.run()
        with pytest.raises(OutputError, match="another packing"):
            other.finish()

    packing.run(progress=intrude)
    packing.finish()
    assert not list(tmp_path.glob(".packing.*.*"))


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*words: object, **more: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with owned(FolderStore(tmp_path), "one"):
        with owned(FolderStore(tmp_path), "one"):
            pass
        with pytest.raises(OutputError, match="another packing"), owned(FolderStore(tmp_path), "two"):
            pass
    assert not list(tmp_path.glob(".held*"))
    assert "this file system cannot lock (Operation not supported)" in capsys.readouterr().err
