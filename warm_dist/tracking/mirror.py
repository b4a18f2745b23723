"""Mirrors a run's folder to MLflow: metrics.jsonl is the truth, and each of its values is stored once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from warm_dist.errors import OutputError, redact
from warm_dist.files import open_regular
from warm_dist.records import read_record, write_record
from warm_dist.runs.folder import METRICS, MIRROR, RUN, SAMPLES, WEIGHTS, Attempt, Mirrored, read_config, read_end
from warm_dist.runs.metrics import parse_line, tell_skipped
from warm_dist.tracking.client import (
    PARENT_TAG,
    REFUSALS,
    Point,
    as_texts,
    client_of,
    find_or_make,
    history,
    log_batches,
    reaching,
)

GRIDS = "samples"  # key of the sample grids; their step is nimg
_ZERO_BNR = 1e-3  # stands for BNR 0 on a logarithmic axis
_PART_BYTES = 1 << 16  # of metrics.jsonl: some hundred lines, a few requests
_RECORD_KEYS = {"time", "attempt", "nimg", "kind"}
_SOURCE = {"mlflow.source.name": "launch/train.py", "mlflow.source.type": "LOCAL"}
_COPIES = 2  # MLflow stores each image and a thumbnail
SendModel = Callable[[Any, str, Path, int], object]
"""(client, run id, weights, nimg): logs the model unless it is there."""


class Mirror:
    """Copies one run's folder to one MLflow run.

    `sync` sends what is new, `finish` also the end. Both raise UnreachableError if the server does not take everything;
    nothing is lost or duplicated, and the next call continues.

    mirror.json stores how far metrics.jsonl was sent and, before a part is sent, where that part ends. A part that may
    have arrived is sent again unchanged, which MLflow stores once (same key, step, time, value). Without mirror.json
    the server is asked what it has.
    """

    def __init__(
        self, run: Path, url: str, experiment: str, run_name: str | None = None, parent: str | None = None
    ) -> None:
        self.run, self.url, self.experiment, self.run_name = run, url, experiment, run_name or run.name
        self.parent = parent
        self._client: Any = None
        self._connected, self._run_id, self._status = False, "", ""
        self._offset = 0
        self._sending: int | None = None
        self._asked_until = 0  # the bytes of metrics.jsonl that `_held`, asked of the server, may cover
        self._held: set[Point] = set()
        self._skipped: dict[int, bytes] = {}  # lines that cannot be read, by their place in the file
        self._grids: set[int] | None = None  # steps whose grid has arrived; None: ask

    def has_begun(self) -> bool:
        """Whether metrics.jsonl has a line, without which there is no MLflow run."""
        return bool(self._first_line())

    def sync(self, running: bool) -> int:
        """Send new metrics, then new files; returns the number of metric values sent.

        Creates the MLflow run once metrics.jsonl has a line. running: set its status to RUNNING.
        """
        if not self.has_begun():
            return 0
        count = self._send_values("RUNNING" if running else None)
        self._send_files()
        return count

    def finish(
        self,
        status: str,
        tags: dict[str, str],
        end_time: float,
        files: Callable[[], list[Path]] = list,
        send_model: SendModel | None = None,
    ) -> None:
        """Send the rest and the run's end, then files.

        status: FINISHED, FAILED or KILLED. end_time: unix seconds. files: returns further files; called last.
        send_model: logs the weights of a FINISHED run.
        """
        if not self.has_begun():
            return
        self._send_values(None)
        with self._server():
            log_batches(self._client, self._run_id, tags=as_texts(tags))
            self._client.set_terminated(self._run_id, status, end_time=int(end_time * 1000))
            self._status = status
        self._send_files()
        with reaching(self.url):
            for path in files():
                self._client.log_artifact(self._run_id, str(path))
            weights = self.run / WEIGHTS
            if send_model and status == "FINISHED" and weights.exists():
                end = read_end(self.run)
                send_model(self._client, self._run_id, weights, end.nimg if end else 0)

    def _send_values(self, status: str | None) -> int:
        if self._size() < max(self._offset, self._sending or 0):
            self._connected = False  # metrics.jsonl was replaced: ask the server what it has
        with self._server():
            self._connect()
            if status and self._status != status:
                self._client.update_run(self._run_id, status=status)
                self._status = status
            return self._send_metrics()

    def _send_files(self) -> None:
        """Send the config and new sample grids. A failing artifact store delays only these, not the metrics."""
        with reaching(self.url):
            if self._grids is None:
                text = json.dumps(redact(read_config(self.run) or {}), indent=2)
                self._client.log_text(self._run_id, text + "\n", "config.json")
                self._grids = self._list_grids()
            for path in sorted((self.run / SAMPLES).glob("*.png")):
                self._send_grid(path, self._grids)

    @contextlib.contextmanager
    def _server(self) -> Iterator[None]:
        try:
            with reaching(self.url):
                yield
        except REFUSALS:
            self._connected = False
            raise

    def _connect(self) -> None:
        """Find or create the MLflow run and learn what it has."""
        if self._connected:
            return
        self._client = self._client or client_of(self.url)
        state = read_record(self.run / MIRROR, Mirrored) or Mirrored(run_id="", offset=0, sending=None)
        found = self._find(state.run_id)
        self._run_id, self._status = str(found.info.run_id), found.info.status
        size = self._size()
        if state.run_id == self._run_id and max(state.offset, state.sending or 0) <= size:
            self._offset, self._sending, self._asked_until = state.offset, state.sending, 0
            self._held = set(self._points(0, state.offset)[0])
        else:
            self._offset, self._sending, self._asked_until = 0, None, size
            self._held = history(self._client, found)
        self._grids = None
        self._describe(found.data.params)
        self._connected = True

    def _find(self, known: str) -> Any:
        first = parse_line(self._first_line()) or {}
        start = int(first["time"] * 1000) if "time" in first else None
        tags = {**_SOURCE, **({PARENT_TAG: self.parent} if self.parent else {})}
        return find_or_make(self._client, self.experiment, self._identity(), self.run_name, tags, start, known)

    def _describe(self, known: dict[str, str]) -> None:
        """Send parameters and tags. MLflow parameters are immutable, so a later attempt's value becomes a tag."""
        config = redact(read_config(self.run) or {})
        # MLflow refuses the name "$schema"
        params = {key: text for key, text in as_texts(config).items() if not key.startswith("$")}
        params |= _axis(config)
        attempt = read_record(self.run / RUN, Attempt)
        info = attempt.model_dump(exclude_none=True, exclude={"config_sha256"}) if attempt else {}
        tags = {f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value}
        tags |= {"mlflow.source.git.commit": info["commit"]} if "commit" in info else {}
        tags |= {PARENT_TAG: self.parent} if self.parent else {}
        new = {key: value for key, value in params.items() if key not in known}
        log_batches(self._client, self._run_id, params=new, tags=as_texts({**info, **tags}))

    def _send_metrics(self) -> int:
        """Send parts until all whole lines have arrived; returns the number of values."""
        count = 0
        while (end := self._sending or self._end_of_part()) > self._offset:
            self._remember(self._offset, end)
            points, tags = self._points(self._offset, end)
            new = {point: entry for point, entry in points.items() if point not in self._held}
            values = {point: (value, time) for point, (_, time, value) in new.items()}
            log_batches(self._client, self._run_id, values, tags=as_texts(tags))
            self._held |= new.keys()
            self._remember(end, None)
            count += len(new)
        tell_skipped(str(self.run / METRICS), [*self._skipped.values()])
        return count

    def _remember(self, offset: int, sending: int | None) -> None:
        self._offset, self._sending = offset, sending
        if offset >= self._asked_until:  # before that, only this process knows what the server has beyond `offset`
            with contextlib.suppress(OutputError):  # on a full disk the next mirror sends more again
                write_record(self.run / MIRROR, {"run_id": self._run_id, "offset": offset, "sending": sending})

    def _points(self, start: int, end: int) -> tuple[dict[Point, tuple[int, float, float]], dict[str, str]]:
        """The lines in these bytes as {point: (attempt, time, value)}, the highest attempt's, and texts as tags."""
        points: dict[Point, tuple[int, float, float]] = {}
        tags: dict[str, str] = {}
        for record in self._records(start, end):
            for name in record.keys() - _RECORD_KEYS:
                value, point = record[name], (f"{record['kind']}/{name}", record["nimg"])
                if isinstance(value, str):
                    tags[f"{record['kind']}.{name}"] = value
                elif value is not None:
                    entry = (record["attempt"], record["time"], float(value))
                    points[point] = max(points.get(point, entry), entry)
        return dict(sorted(points.items())), tags

    def _records(self, start: int, end: int) -> list[dict[str, Any]]:
        with (self.run / METRICS).open("rb") as file:
            file.seek(start)
            lines = file.read(end - start).split(b"\n")
        parsed = [(line, parse_line(line)) for line in lines]
        self._skipped |= {start + k: line for k, (line, record) in enumerate(parsed) if record is None}
        return [record for _, record in parsed if record is not None]

    def _end_of_part(self) -> int:
        """The end of the last whole line in the next part of the file; what follows may be incomplete."""
        with (self.run / METRICS).open("rb") as file:
            file.seek(self._offset)
            new = file.read(_PART_BYTES)
            while b"\n" not in new and (more := file.read(_PART_BYTES)):
                new += more
        return self._offset + new.rfind(b"\n") + 1

    def _size(self) -> int:
        try:
            return (self.run / METRICS).stat().st_size
        except OSError:
            return 0

    def _list_grids(self) -> set[int]:
        """The steps of the sample grids that have arrived with both copies; files are NAME+step+STEP+timestamp+…"""
        files = self._client.list_artifacts(self._run_id, "images")
        names = [file.path.rpartition("/")[2].split("+") for file in files]
        steps = [int(parts[2]) for parts in names if parts[0] == GRIDS and len(parts) > 2]
        return {step for step in steps if steps.count(step) >= _COPIES}

    def _send_grid(self, path: Path, arrived: set[int]) -> None:
        step = int(path.stem) if path.stem.isdecimal() else -1
        if step < 0 or step in arrived:
            return
        from PIL import Image

        try:
            with open(open_regular(path), "rb") as file, Image.open(file) as image:
                milliseconds = int(os.fstat(file.fileno()).st_mtime * 1000)
                image.load()
        except (OSError, SyntaxError):  # deleted since, or not an image
            return
        self._client.log_image(self._run_id, image, key=GRIDS, step=step, timestamp=milliseconds)
        arrived.add(step)

    def _first_line(self) -> bytes:
        try:
            with (self.run / METRICS).open("rb") as file:
                line = file.readline()
        except OSError:
            return b""
        return line if line.endswith(b"\n") else b""

    def _identity(self) -> str:
        """A unique id of the run: the digest of the first line of metrics.jsonl with its time; "" without a line."""
        line = self._first_line()
        return hashlib.sha256(line).hexdigest()[:32] if line else ""


def _axis(config: dict[str, Any]) -> dict[str, str]:
    """log10 of a constant BNR, for the linear axes of MLflow's parallel coordinates.

    BNR 0 becomes 0.001: MLflow would draw a run without the parameter above the largest value.
    """
    bnr = config.get("process", {}).get("bnr")
    return {"log10_bnr": f"{math.log10(max(bnr, _ZERO_BNR)):.4f}"} if isinstance(bnr, int | float) else {}
