"""Locks and new files where the file system cannot lock, and where it has no hard links."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import socket
import time
from pathlib import Path

import pytest

from warm_dist import files, supervisor
from warm_dist.errors import DiskFullError, OutputError
from warm_dist.files import claimed, create_file, locked, replace_file, write_json
from warm_dist.store.folder import FolderStore

NO_LOCKS = ("ENOSYS", "ENOTSUP", "ENOLCK", "EPERM")


@pytest.fixture(params=NO_LOCKS)
def unlockable(request, monkeypatch):
    """As Lustre without flock, some FUSE and SMB."""
    number = getattr(errno, request.param)

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    return os.strerror(number)


def test_a_lock_there_is_one_and_is_said_to_be_another(unlockable, tmp_path, capsys):
    """Fault: "another process is using it", where nobody is; or two that write at once."""
    lock = tmp_path / "a.lock"
    with locked(lock) as file:
        file.write("text")
        file.flush()
        holder = tmp_path / ".held.a.lock"
        assert holder.read_text() == f"{socket.gethostname()} {supervisor.identity(os.getpid())}"
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .* holds it; .* remove {holder}"):
            locked(lock)
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
    with locked(lock, math.inf) as file:
        assert file.read() == "text"
    assert f"{tmp_path}: this file system cannot lock ({unlockable}); files .held.*" in capsys.readouterr().err


def test_a_holder_that_was_killed_holds_nothing(unlockable, tmp_path):
    """Fault: after kill -9 a folder is locked for ever."""
    (tmp_path / ".held.a.lock").write_text(f"{socket.gethostname()} {os.getpid()}:1")  # our pid, of an earlier process
    locked(tmp_path / "a.lock").close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


@pytest.mark.parametrize("text", ["node7 12:345", ""])
def test_another_machine_s_holder_is_named_and_never_removed(unlockable, tmp_path, text, monkeypatch):
    monkeypatch.setattr(files, "_LONGEST_S", 0.1)
    holder = tmp_path / ".held..lock"
    holder.write_text(text)
    begun = time.monotonic()
    who = r"process 12 on node7" if text else "process  on a machine unknown"
    with pytest.raises(BlockingIOError, match=f"{who} holds it; if that is gone, remove {holder}"):
        locked(tmp_path / ".lock", math.inf)  # whoever waits for ever would never end
    assert time.monotonic() - begun < 5
    with pytest.raises(OutputError, match=f"another sweep is using it \\({who} holds it; if that is gone, remove"):
        claimed(tmp_path, "sweep")
    assert holder.read_text() == text


def test_only_one_takes_over(tmp_path):
    holder = tmp_path / "h"
    holder.write_text("node1 5:6")  # meanwhile another process took it over
    files._bury(holder, "node1 1:2")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("h", "node1 5:6")]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_a_file_is_created_without_hard_links(monkeypatch, tmp_path, number):
    """Fault: on exFAT or SMB a finished run ends with PermissionError, and without its exit.json."""

    def link(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    create_file(tmp_path / "exit.json", b"1", tmp_path / ".exit")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "exit.json", b"2", tmp_path / ".exit")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("exit.json", b"1")]


class Half:
    """A disk that is full in the middle of a file."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


@pytest.fixture
def full(monkeypatch):
    """Every file that is opened for writing by its path."""
    real = Path.open

    def half(path, mode="r", *rest, **more):
        file = real(path, mode, *rest, **more)
        return file if "r" in mode else Half(file)

    monkeypatch.setattr(Path, "open", half)


def test_a_full_disk_leaves_no_part_of_a_file(full, monkeypatch, tmp_path):
    """Fault: half-written names pile up on a disk that is full already."""
    source = FolderStore(tmp_path / "source")
    (tmp_path / "source").mkdir()
    with os.fdopen(os.open(tmp_path / "source" / "a", os.O_WRONLY | os.O_CREAT), "wb") as file:
        file.write(bytes(100))
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    for write in (
        lambda: replace_file(out / "a", lambda temporary: temporary.write_bytes(bytes(100))),
        lambda: write_json(out / "b", {"key": "value"}),
        lambda: FolderStore(out).write("c", bytes(100)),
        lambda: source.download("a", out / "e"),
    ):
        with pytest.raises(DiskFullError, match="No space left"):
            write()
        assert list(out.iterdir()) == []
    with pytest.raises(OSError, match="No space left"):
        create_file(out / "exit.json", b"text", out / ".exit")
    assert list(out.iterdir()) == []
