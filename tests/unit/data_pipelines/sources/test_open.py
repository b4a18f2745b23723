"""What every source has: an order, an identity, parts that travel, and refusals."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.sources.open import open_source
from tests.support.pictures import encode, good, noise
from warm_dist.errors import ConfigError, DataError


def test_shuffled_is_the_same_samples_in_an_order_that_never_changes(tree: Path) -> None:
    for number in range(50):
        (tree / "ant" / f"{number:02d}.png").write_bytes(encode(noise(number)))
    plain, mixed = open_source(str(tree), 8), open_source(str(tree), 8, shuffle=True)
    keys = [item.key for item in good(mixed)]
    assert sorted(keys) == [item.key for item in good(plain)]
    assert keys != sorted(keys)
    assert keys == [item.key for item in good(open_source(str(tree), 8, shuffle=True))]
    images = {item.key: item.image for item in good(plain)}
    assert all(np.array_equal(item.image, images[item.key]) for item in good(mixed))
    assert plain.identity != mixed.identity


def test_any_part_of_a_source_travels_to_another_process(tree: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for path in tree.rglob("*.png"):
            archive.write(path, path.relative_to(tree).as_posix())
    for spec in (str(tree), str(tmp_path / "tree.zip"), "digits", "openmoji"):
        source = open_source(spec, 8)
        part = list(pickle.loads(pickle.dumps(source.part(1, 3))))
        assert [item.key for item in part] == [item.key for _, item in zip(range(3), source, strict=False)][1:]


def test_identity_changes_with_what_the_bytes_depend_on(tree: Path) -> None:
    seen = {open_source(str(tree), size, resize).identity for size in (4, 8) for resize in ("box", "lanczos", "adm")}
    (tree / "ant" / "z.png").write_bytes(encode(noise(7)))
    seen.add(open_source(str(tree), 8).identity)
    (tree / "ant" / "z.png").write_bytes(encode(noise(7, 9, 9)))
    seen.add(open_source(str(tree), 8).identity)
    assert len(seen) == 8
    assert open_source(str(tree), 8).identity == open_source(str(tree), 8).identity


def test_unknown_sources_and_broken_archives(tmp_path: Path) -> None:
    """Fault: a misspelt path or a broken archive ends in a library's own exception."""
    with pytest.raises(ConfigError, match="no such source"):
        open_source(str(tmp_path / "nowhere"), 8)
    for resolution, resize in ((0, "box"), (4096, "box"), (8, "cubic")):
        with pytest.raises(ConfigError, match=f"resolution {resolution}, resize '{resize}'"):
            open_source(str(tmp_path), resolution, resize)
    for name, words in (
        ("a.zip", "not a readable zip"),
        ("a.parquet", "not readable as Parquet"),
        ("a.tar", "not a readable tar"),
        ("a.tar.gz", "not a readable compressed tar"),
    ):
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(DataError, match=words):
            open_source(str(tmp_path / name), 8)
