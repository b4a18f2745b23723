"""metrics.jsonl, the truth about a run: append-only lines, each with nimg, attempt and a timestamp; atomic JSON files."""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from warm_dist.errors import OutputError


class Listener(Protocol):
    """Is shown what MetricsLog writes, and what is too much for the file."""

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """One record, without time and attempt."""

    def show_ranks(self, ranks: list[dict[str, float]]) -> None:
        """Every rank's own figures, in the order of ranks."""


class MetricsLog:
    """Appends records to metrics.jsonl; used by rank 0 alone. listener: is shown every record."""

    def __init__(self, path: Path, attempt: int, listener: Listener | None = None) -> None:
        self.path, self.attempt, self.listener = path, attempt, listener
        _mend_last_line(path)

    def begin(self) -> None:
        """Give a run without a line its first, which no other run has: by it mirrors know the run again."""
        if not self.path.exists() or not self.path.stat().st_size:
            self.write(0, "start", id=secrets.token_hex(8))

    def write(self, nimg: int, kind: str, **values: float | str | None) -> None:
        """Append one line. Raises OutputError if the disk refuses."""
        line = {"time": round(time.time(), 3), "attempt": self.attempt, "nimg": nimg, "kind": kind, **values}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from None
        if self.listener is not None:
            self.listener.show(kind, {"nimg": nimg, **values})

    def show_ranks(self, ranks: list[dict[str, float]]) -> None:
        """Every rank's own figures: for the listener only, since there may be a thousand of them."""
        if self.listener is not None:
            self.listener.show_ranks(ranks)


def _mend_last_line(path: Path) -> None:
    """End a line that a killed process left half-written, so that the next one stands alone (readers skip it)."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def parse_line(line: str) -> dict[str, Any] | None:
    """One line's record, or None for a half-written one."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and {"time", "attempt", "nimg", "kind"} <= record.keys() else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records by rising nimg, of each (kind, nimg) that of the highest attempt; none if there is no file."""
    return parse_records(path.read_text(encoding="utf-8")) if path.exists() else []


def parse_records(text: str) -> list[dict[str, Any]]:
    """The same of a file's text."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for line in text.splitlines():
        record = parse_line(line)
        if record is not None:
            key = (record["kind"], record["nimg"])
            if key not in best or record["attempt"] >= best[key]["attempt"]:
                best[key] = record
    return sorted(best.values(), key=lambda record: (record["nimg"], record["kind"]))


def last_attempt(path: Path) -> int:
    """The highest attempt that a metrics.jsonl tells of, 0 for none."""
    return max((record["attempt"] for record in read_metrics(path)), default=0)
