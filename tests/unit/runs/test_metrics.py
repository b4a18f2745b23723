"""metrics.jsonl and the JSON files of a run."""

from __future__ import annotations

import json
import os

import pytest

from warm_dist.errors import OutputError
from warm_dist.files import read_json, write_json
from warm_dist.runs.metrics import MetricsLog, parse_line, read_metrics


def test_the_highest_attempt_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for attempt, losses in ((1, {32: 1.0, 64: 0.9}), (2, {64: 0.8, 96: 0.7})):
        log = MetricsLog(path, attempt)
        for nimg, loss in losses.items():
            log.write(nimg, "train", loss=loss)
    assert [(r["nimg"], r["loss"], r["attempt"]) for r in read_metrics(path)] == [
        (32, 1.0, 1),
        (64, 0.8, 2),
        (96, 0.7, 2),
    ]


def test_of_two_lines_of_one_attempt_the_later_counts(tmp_path):
    """Fault: of a line that one attempt wrote twice the earlier one is shown."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    for loss in (1.0, 0.9):
        log.write(32, "train", loss=loss)
    assert [r["loss"] for r in read_metrics(log.path)] == [0.9]


def test_a_half_written_line_harms_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, 1).write(32, "train", loss=1.0)
    with path.open("a") as file:
        file.write('{"time": 1, "attempt": 1, "ni')
    MetricsLog(path, 2).write(64, "train", loss=0.5)
    assert [r["nimg"] for r in read_metrics(path)] == [32, 64]


def test_nothing_there_is_nothing(tmp_path):
    """Fault: reading the metrics of a run that has logged nothing yet ends in a FileNotFoundError."""
    assert read_metrics(tmp_path / "absent") == []
    assert read_json(tmp_path / "absent") is None


def test_json_is_replaced_as_a_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2}
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_json(tmp_path / "none" / "a.json", {})


ODD = (b"", b"garbage", b"\0\0\0", b"\xff\xfe", b"[1]", b"null", b'{"nimg": 1}', b"[" * 50_000,
       *(json.dumps({"time": 1.0, "attempt": 1, "nimg": 64, "kind": "train", "loss": 1.0} | odd).encode() for odd in (
           {"nimg": "64"}, {"nimg": 64.0}, {"nimg": True}, {"nimg": -1}, {"nimg": 10**400}, {"attempt": None}, {"attempt": []},
           {"time": "now"}, {"time": 1e300}, {"kind": []}, {"kind": "later"}, {"kind": "event", "text": 7}, {"loss": "half"},
           {"loss": [1]}, {"loss": {}}, {"loss": float("nan")}, {"loss": 10**400}, {"kind": "eval"}, {"a\u2028b": 1.0},
           {".": 1.0}, {"..": 1.0}, {"a/../b": 1.0}, {"a//b": 1.0}, {"/a": 1.0}, {"a/": 1.0}, {"./a": 1.0}, {"": 1.0},
           {"x" * 300: 1.0}, {"text": "x" * 2_000_000})))  # fmt: skip


@pytest.mark.parametrize("number", range(len(ODD)))
def test_a_line_that_cannot_be_read_is_skipped_and_told_once(tmp_path, capsys, number):
    """Fault: one bit in metrics.jsonl blocks every resume, or its mirror for ever."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 1)
    log.write(32, "train", loss=1.0)
    with path.open("ab") as file:
        file.write(ODD[number] + b"\n")
    log.write(96, "train", loss=None)
    assert [[r["nimg"] for r in read_metrics(path)] for _ in range(2)] == [[32, 96]] * 2
    assert capsys.readouterr().err.splitlines() == [f"{path}: 1 line cannot be read; skipped"] * bool(ODD[number])


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_something_else_in_the_log_s_place_is_named(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(OutputError, match=r"metrics\.jsonl: cannot be written"):
        MetricsLog(path, 1).write(32, "train", loss=1.0)


def test_keys_that_mlflow_takes_are_read():
    for key in ("loss", "node_0/cpu_utilization_percentage", "a/b/c", "a.b", ".a", "a..b", "a b", "x" * 200):
        record = {"time": 1.0, "attempt": 1, "nimg": 64, "kind": "system", key: 1.0}
        assert parse_line(json.dumps(record).encode()) == record
