"""Records: no flipped bit, no garbage and no odd file is taken for what was written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from warm_dist.records import DamagedError, Record, read_record, seal, unseal, write_record


class Thing(Record):
    name: str
    count: int
    parts: tuple[float, ...] = ()


WRITTEN = {"name": "a µ \n", "count": 7, "parts": [0.1, 1e-300]}
GARBAGE = (b"", b"{", b"[]", b"null", b"\0" * 64, b"{}", b'{"name": 1, "count": 7}', b'{"name": "a", "count": "7"}',
           b'{"name": "a", "count": true}', b'{"name": "a", "count": 1e400}', b'{"name": "a", "count": ' + b"9" * 5000 + b"}",
           b'{"name": "a", "count": 7, "more": 1}', b"[" * 100_000, b'\xff{"name": "a"}', '{"name": "a"}'.encode("utf-16"),
           b'{"name": "a", "count": 7, "sha256": null, "parts": 3}', b'{"name": "a", "count": 7, "sha256": "0"}')  # fmt: skip


def test_every_flipped_bit_is_found_or_changes_nothing() -> None:
    """Fault: one bit of COMPLETE resumes at another nimg, without a word."""
    text = seal(WRITTEN)
    assert unseal(text, Thing).model_dump(mode="json") == WRITTEN
    accepted = 0
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert unseal(bytes(flipped), Thing).model_dump(mode="json") == WRITTEN
            accepted += 1
        except DamagedError:
            pass
    assert accepted < len(text) / 4, "spaces between the values, and no more"


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_refused_in_words(data: bytes) -> None:
    with pytest.raises(DamagedError, match=r"^(is not|is damaged|differs)"):
        unseal(data, Thing)


def test_one_of_an_older_version_has_no_digest() -> None:
    assert unseal(json.dumps(WRITTEN).encode(), Thing).count == 7


@pytest.mark.parametrize("kind", ["folder", "fifo", "garbage", "loop", "device"])
def test_what_is_no_record_is_passed_over_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Fault: a FIFO in the place of exit.json, and whoever reads it waits for ever."""
    path = tmp_path / "thing.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "garbage":
        path.write_bytes(b"\0\0")
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    assert [read_record(path, Thing), read_record(path, Thing)] == [None, None]
    told = capsys.readouterr().err
    assert told.count(f"{path}: ") == told.count("passed over") == 1


def test_nothing_there_is_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path / "thing.json", WRITTEN)
    assert read_record(tmp_path / "other.json", Thing) is None
    assert read_record(tmp_path / "thing.json", Thing) == Thing(name="a µ \n", count=7, parts=(0.1, 1e-300))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"name": 5, "count": 7}, "is damaged (name is 5)"),
        ({"name": "a"}, "is damaged (lacks count)"),
        ({"name": "a", "count": 7, "more": 1}, "is damaged (has an unknown key, more)"),
        ({"name": "a", "count": 7, "parts": ["x"]}, 'is damaged (parts.0 is "x")'),
    ],
)
def test_what_is_damaged_is_said_in_words(tree: dict[str, object], told: str) -> None:
    with pytest.raises(DamagedError) as caught:
        unseal(json.dumps(tree).encode(), Thing)
    assert str(caught.value) == told
