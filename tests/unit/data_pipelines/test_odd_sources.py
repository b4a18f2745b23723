"""Trees of odd names and contents: a few in every test run, thousands in `make soak`; nothing is lost without being counted."""

from __future__ import annotations

import io
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.sources.base import BadImage, Source
from data_pipelines.sources.listing import SPLITS, Choice
from data_pipelines.sources.open import open_source
from tests.support.pictures import encode, noise
from tests.unit.data_pipelines.sources.test_listing import as_folder, as_tar, as_zip
from warm_dist.errors import WarmDistError

few = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
LIMIT_S = 20  # for one tree, of at most 12 small files


def _table() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [encode(noise(1))], "label": [0]}), buffer)
    return buffer.getvalue()


PNG = encode(noise(0))
CONTENTS = (PNG, encode(noise(1), "JPEG"), encode(noise(2), "GIF"), PNG[:40], b"", b"text", b"1", b"cat", b"-3", bytes(600), _table(),
            b'{"labels": null}', b'{"labels": [["a.png", 1], ["train/a.png", 0]]}', b'{"labels": 3}', b"[[[[", b"PK\3\4",
            b"\x89PNG\r\n\x1a\n" + b"\xff" * 60, b"II*\0\xff\xff", b"RIFF\0\0\0\0WEBPVP8 ", b"GIF89a\xff\xff\xff\xff")  # fmt: skip
FOLDERS = ("ant", "bee", "train", "val", "Test", "masks", "labels", "00000", "01000", ".hidden", "__MACOSX", "@eaDir", "x" * 100,
           "\x1b[31mred", "two\nlines", "\u202ertl", "[a-z]*", "data", "parts")  # fmt: skip
BASES = ("a", "b", "a_mask", "mask_a", "train_1", "test-1", "a.seg", ".DS_Store", "._a", "Thumbs", "dataset", "LICENSE", "000000-0123456789ab",
         "manifest", "$(x)", "a b", "é", "!")  # fmt: skip
SUFFIXES = (
    ".png",
    ".PNG",
    ".jpg",
    ".gif",
    ".cls",
    ".CLS",
    ".json",
    ".txt",
    "",
    ".bak",
    ".parquet",
    ".zip",
    ".dat",
    ".tif",
    ".tar",
)
names = st.builds(
    lambda folders, base, suffix: "/".join([*folders, base + suffix]),
    st.lists(st.sampled_from(FOLDERS), max_size=3),
    st.sampled_from(BASES),
    st.sampled_from(SUFFIXES),
)
trees = st.dictionaries(names, st.sampled_from(CONTENTS), max_size=12)
choices = st.builds(
    Choice,
    st.none() | st.sampled_from(("folders", "none", "dataset.json", "cls", "label")),
    st.none() | st.sampled_from((*SPLITS, "all", "none")),
    st.sampled_from(((), ("*",), ("*.png", "*.PNG"), ("train/*",))),
    st.sampled_from(((), ("*mask*",), ("*.tar", "*.parquet", "*.json"))),
)


def opened(path: Path, choice: Choice) -> Source | None:
    """The source, or None if it is refused in printable lines."""
    try:
        source: Source | None = open_source(str(path), 8, choice=choice)
    except WarmDistError as error:
        source, lines = None, [str(error)]
    else:
        lines = [str(path), *source.told]
    assert lines[0].startswith(str(path))
    assert all(map(str.isprintable, lines))
    return source


def accounted(source: Source) -> int:
    """The images of a source, and the files that it tells are left out."""
    counts = [re.search(r": (\d+) \((?:[^;]*; )?such as ", line) for line in source.told if line.startswith("left out")]
    assert all(counts)
    absent = [line for line in source.told if "not there" in line]
    lost = sum(int(found[1]) for line in absent if (found := re.search(r": (\d+) \(", line)))
    return len(source) + sum(int(found[1]) for found in counts if found) - lost


def check(folder: Path, files: dict[str, bytes], choice: Choice) -> None:
    """A folder, a zip and a tar of the same files are read alike; each picture and each other file is accounted for."""
    start = time.monotonic()
    paths = [folder / name for name in ("in", "in.zip", "in.tar")]
    shutil.rmtree(paths[0], ignore_errors=True)
    paths[0].mkdir()
    for path, write in zip(paths, (as_folder, as_zip, as_tar), strict=True):
        write(path, files)
    found = [opened(path, choice) for path in paths]
    for source in filter(None, found[1:]):
        labels = len(files) - accounted(source)  # cls files and dataset.json, as far as they give labels
        assert 0 <= labels <= sum(name.lower().endswith((".cls", "dataset.json")) for name in files), source.told
    shards = any(name.lower().endswith((".tar", ".parquet")) for name in files)
    ours = any("0123456789ab.tar" in name for name in files)
    told = [source and [(item.key, getattr(item, "label", None)) for item in source] for source in found]
    assert told[1] == told[2]
    assert shards or ours or told[0] is None or told[1] is None or sorted(told[0]) == sorted(told[1])
    for source in filter(None, found):
        for item in source:
            assert isinstance(item, BadImage) or item.image.shape == (8, 8, 3)
            assert not isinstance(item, BadImage) or item.reason.isprintable()
    assert time.monotonic() - start < LIMIT_S


def check_links(folder: Path, files: dict[str, bytes], links: list[tuple[str, str]]) -> None:
    """Links anywhere, to anything, and names of other bytes: an end, in time."""
    start = time.monotonic()
    shutil.rmtree(folder / "in", ignore_errors=True)
    (folder / "in" / os.fsdecode(b"\xff\xfe")).mkdir(parents=True)
    (folder / "in" / os.fsdecode(b"\xff\xfe") / os.fsdecode(b"\xfd.png")).write_bytes(PNG)
    as_folder(folder / "in", files)
    for number, (place, target) in enumerate(links):
        home = folder / "in" / place
        (home if home.is_dir() else folder / "in").joinpath(f"link{number}").symlink_to(target)
    for split in (None, "all"):
        source = opened(folder / "in", Choice("none", split))
        assert source is None or all(isinstance(item, BadImage) or np.isfinite(item.image).all() for item in source)
    assert time.monotonic() - start < LIMIT_S


links = st.lists(
    st.tuples(
        st.sampled_from(FOLDERS), st.sampled_from((".", "..", "../..", "ant", "../ant", "gone", "/dev/null", "link0"))
    ),
    max_size=5,
)


@pytest.mark.parametrize("effort", [few, pytest.param(many, marks=pytest.mark.soak)], ids=["few", "many"])
def test_odd_trees(tmp_path: Path, effort: settings) -> None:
    """Fault: a picture neither packed nor counted, containers that differ, a library's exception, or a hang."""
    effort(given(trees, choices)(lambda files, choice: check(tmp_path, files, choice)))()


@pytest.mark.parametrize("effort", [few, pytest.param(many, marks=pytest.mark.soak)], ids=["few", "many"])
def test_odd_links(tmp_path: Path, effort: settings) -> None:
    """Fault: a loop of links that never ends, or a name of other bytes that ends in a UnicodeEncodeError."""
    effort(given(trees, links)(lambda files, found: check_links(tmp_path, files, found)))()
