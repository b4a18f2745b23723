"""What reaches the disk, and in which order: a recording of the calls that decide what a power cut leaves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


class Recorder:
    """Records as (what, path): "sync" of a file or folder, "rename" to a name, "remove" of a name.

    A call with a path relative to a folder's descriptor, as shutil.rmtree makes them, is recorded with the whole path.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Path]] = []
        real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "link", "unlink", "rmdir")}

        def whole(path: Any, folder: int | None) -> Path:
            return (Path(os.readlink(f"/proc/self/fd/{folder}")) / path) if folder is not None else Path(path)

        def fsync(descriptor: int) -> None:
            self.calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
            real["fsync"](descriptor)

        def moving(name: str) -> Any:
            def move(source: Any, target: Any, **more: Any) -> None:
                real[name](source, target, **more)
                self.calls.append(("rename", Path(target)))

            return move

        def removing(name: str) -> Any:
            def remove(path: Any, *, dir_fd: int | None = None) -> None:
                place = whole(path, dir_fd)
                real[name](path, dir_fd=dir_fd)
                self.calls.append(("remove", place))

            return remove

        monkeypatch.setattr(os, "fsync", fsync)
        for name in ("replace", "rename", "link"):
            monkeypatch.setattr(os, name, moving(name))
        for name in ("unlink", "rmdir"):
            monkeypatch.setattr(os, name, removing(name))

    def first(self, what: str, path: Path) -> int:
        """The number of the first such call; fails if there is none."""
        return self.calls.index((what, path))

    def durable_from(self, path: Path) -> int:
        """The call from which a file renamed to `path` survives a power cut: content, rename, then its folder's list."""
        renamed = self.first("rename", path)
        before = [place for what, place in self.calls[:renamed] if what == "sync" and place.parent == path.parent]
        assert any(place.name.startswith(f".{path.name}") or place.name.startswith(".exit.") for place in before), path
        return self.calls.index(("sync", path.parent), renamed)
