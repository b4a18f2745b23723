"""The part of metrics.jsonl that is sent: whole lines, each once, in pieces."""

from __future__ import annotations

import os
from pathlib import Path

from warm_dist.tracking.mirror import Mirror


def test_only_whole_lines_are_read_and_each_once(run: Path) -> None:
    mirror = Mirror(run, "http://127.0.0.1:1", "x")
    file = run / "metrics.jsonl"
    line = '{"time": 1.5, "attempt": 1, "nimg": 32, "kind": "train", "loss": 0.5}\n'
    file.write_text(line + line[:20])
    assert mirror._end_of_part() == len(line)
    assert mirror._points(0, len(line)) == ({("train/loss", 32): (1, 1.5, 0.5)}, {})
    mirror._offset = len(line)
    assert mirror._end_of_part() == len(line)
    file.write_text(line + line[:20] + "\n" + line.replace("32", "64").replace("0.5", '"half"'))
    assert mirror._end_of_part() == file.stat().st_size
    assert mirror._points(len(line), file.stat().st_size) == ({}, {})
    file.write_text(line * 5000)
    mirror._offset, ends = 0, []
    while (end := mirror._end_of_part()) > mirror._offset:
        ends.append(end)
        mirror._offset = end
    assert len(ends) > 3, "in pieces, so that a failure costs one"
    assert all(end % len(line) == 0 for end in ends)
    assert ends[-1] == file.stat().st_size


def test_a_picture_that_is_no_file_is_passed_over(tmp_path: Path) -> None:
    """Fault: a FIFO in samples/ is waited for, for ever."""
    (tmp_path / "samples").mkdir()
    os.mkfifo(tmp_path / "samples" / "000000000400.png")
    sent: set[int] = set()
    Mirror(tmp_path, "http://127.0.0.1:9", "x")._send_grid(tmp_path / "samples" / "000000000400.png", sent)
    assert sent == set()
