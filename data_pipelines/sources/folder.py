"""A folder of images as a source."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_pipelines.sources.base import Source, check_size, is_picture, listed_tree
from data_pipelines.sources.transform import Transform


def _read(root: str, name: str) -> bytes:
    path = os.path.join(root, name)
    check_size(name, os.stat(path).st_size)
    with open(path, "rb") as file:
        return file.read()


def open_folder(root: Path, transform: Transform) -> Source:
    """The images below a folder; class folders become labels. Symbolic links to folders are not followed."""

    def files() -> Iterator[tuple[str, int]]:
        pending = [""]
        while pending:
            folder = pending.pop()
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{name}/")
                    elif is_picture(name) and entry.is_file():
                        yield name, entry.stat().st_size

    return listed_tree(files(), lambda name: name, partial(_read, str(root)), transform, f"{root}")
