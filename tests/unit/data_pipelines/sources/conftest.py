"""A folder of pictures, for every kind of source."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pictures import encode, noise


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two class folders with two images each, written in an order that is not the sorted one."""
    for number, name in enumerate(("zebra/b.png", "zebra/a.png", "ant/y.png", "ant/x.png")):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(encode(noise(number)))
    (tmp_path / "tree" / "zebra" / "notes.txt").write_text("no image")
    return tmp_path / "tree"
