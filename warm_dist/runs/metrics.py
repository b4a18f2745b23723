"""metrics.jsonl, the truth about a run: an append-only file with one JSON record per line."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypedDict, get_type_hints

from warm_dist.errors import OutputError, print_once, writing
from warm_dist.files import open_regular, read_regular, sync


class Record(TypedDict):
    """What every record has."""

    time: float  # Unix time, seconds
    attempt: int  # counts the starts of the run, from 1
    nimg: int
    kind: str  # a key of RECORDS


class Start(Record):  # the first line of a run
    id: str  # random, identifies the run


class Train(Record, total=False):  # training since the last such record, over all ranks
    loss: float | None  # mean over images of the weighted squared error per pixel, network units; null: none finite
    loss_blurry: float | None  # the same of the denoiser head alone
    loss_residual: float | None  # the same of the deblurrer head alone, unweighted
    head_inconsistency: float | None  # mean of |b̂ - A x̂0| / |b̂| over the images of the last step
    images_per_s: float  # of all ranks
    grad_norm: float | None  # of the last step, before clipping; null: not finite
    step_s: float  # seconds a step, mean over ranks, as the next five, which are its parts
    data_s: float
    forward_s: float
    backward_s: float
    update_s: float
    ema_s: float
    memory_bytes: int  # peak so far, largest of all ranks
    flops_per_s: float  # of one rank
    mfu: float  # flops_per_s over the device's peak, if that is known
    slowest_rank: int  # by data_s + forward_s (ZeRO 3: data_s); absent with one rank, as the next
    slowest_s: float  # its excess over the median rank, seconds a step
    lr: float  # of the last step
    skipped_steps: int  # non-finite ones in this attempt


class System(Record):
    """Load of the machines, under MLflow's names with their units; `node_K/NAME` with several. See machine_load."""


class Checkpoint(Record):  # a checkpoint was written
    write_s: float  # seconds
    bytes: int  # of all ranks' files


class Upload(Record):  # an upload of a checkpoint (kind upload) or snapshot (snapshot_upload) ended
    seconds: float
    failed: float  # 0 or 1


class Event(Record):  # something worth reporting, such as a non-finite step
    text: str


class Eval(Record, total=False):  # an evaluation; distances compare only where `measure` is equal
    frechet: float  # mean over blocks, as the next three
    kid: float  # absent with few or no eval.kid_images, as the next two
    precision: float
    recall: float
    spread: float | None  # standard deviation over blocks; null with one
    blocks: int
    floor: float  # distance of floor_n real images from the other real ones
    floor_n: int
    num_images: int  # generated, per block
    nfe: int  # network evaluations per image
    bnr: str
    method: str
    name: str  # what the distance may be called
    spec: str  # hash of all that defines the number
    measure: str  # hash of how it is measured
    grid: str  # path of the picture in the run's folder
    seconds: float


RECORDS = {"start": Start, "train": Train, "system": System, "checkpoint": Checkpoint, "upload": Upload,
           "snapshot_upload": Upload, "event": Event, "eval": Eval}  # fmt: skip


class Listener(Protocol):
    """Receives what MetricsLog writes, and what is too much for the file."""

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """One record, without time and attempt."""

    def show_ranks(self, ranks: list[dict[str, float]]) -> None:
        """Figures of each rank, in rank order."""


class MetricsLog:
    """Appends records to metrics.jsonl and passes them to `listener`. Rank 0 only.

    check: called before each line; raises what makes writing wrong.
    """

    def __init__(
        self, path: Path, attempt: int, listener: Listener | None = None, check: Callable[[], None] = lambda: None
    ) -> None:
        self.path, self.attempt, self.listener, self.check = path, attempt, listener, check
        with writing(path):
            if path.exists() and path.stat().st_size:
                with open(open_regular(path, os.O_RDWR), "rb+") as file:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # end a line that a killed process left unfinished; readers skip it
                        file.write(b"\n")

    def begin(self) -> None:
        """Write the first line of a new run, whose random id lets mirrors recognise the run."""
        if not self.path.exists() or not self.path.stat().st_size:
            self.write(0, "start", id=secrets.token_hex(8))
            self.sync()

    def sync(self) -> None:
        """Make all lines so far durable. Raises OutputError."""
        with writing(self.path):
            if self.path.exists():
                sync(self.path)
                sync(self.path.parent)

    def write(self, nimg: int, kind: str, **values: float | str | None) -> None:
        """Append one record. Raises OutputError."""
        self.check()
        told = {k: finite(v) if isinstance(v, float) else v for k, v in values.items()}  # JSON has no NaN
        line = {"time": round(time.time(), 3), "attempt": self.attempt, "nimg": nimg, "kind": kind, **told}
        appending = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with writing(self.path), open(open_regular(self.path, appending), "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
        if self.listener is not None:
            self.listener.show(kind, {"nimg": nimg, **values})

    def show_ranks(self, ranks: list[dict[str, float]]) -> None:
        """Pass figures of each rank to the listener only: there may be a thousand ranks."""
        if self.listener is not None:
            self.listener.show_ranks(ranks)


_TEXTS = {
    kind: {key for key, hint in get_type_hints(record).items() if hint is str} for kind, record in RECORDS.items()
}
_PART = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9_.: -]+"  # MLflow refuses a name with an empty part, "." or ".."
_KEY = re.compile(rf"(?=.{{1,200}}$){_PART}(?:/{_PART})*")
_MOST = {"time": 1e11, "attempt": 2**31, "nimg": 2**53}
_LINE_BYTES = 1 << 20


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Parse one line; None if it is unfinished or not as `MetricsLog` writes it."""
    try:
        record = json.loads(line.decode()) if len(line) <= _LINE_BYTES else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("kind") not in [*RECORDS]:
        return None
    for key, most in _MOST.items():
        value = finite(record.get(key))
        if value is None or not 0 <= value <= most or (key != "time" and not isinstance(record[key], int)):
            return None
    texts = _TEXTS[record["kind"]]
    fine = (isinstance(v, str) if k in texts else v is None or finite(v) is not None for k, v in record.items())
    whole = record["kind"] != "eval" or finite(record.get("frechet")) is not None
    return record if whole and all(fine) and all(map(_KEY.fullmatch, record)) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records by nimg; for each (kind, nimg) only that of the highest attempt. Empty if there is no file.

    Lines that cannot be read are skipped, and counted on stderr. Raises OutputError if the file cannot be read.
    """
    try:
        return parse_records(read_regular(path), str(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be read ({error.strerror}); move it away, or choose another folder"
        ) from None


def parse_records(data: bytes, name: str) -> list[dict[str, Any]]:
    """As `read_metrics`, from a file's bytes and its name."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    lines = data.split(b"\n")[:-1]  # what follows the last line break is being written
    records = [parse_line(line) for line in lines]
    tell_skipped(name, [line for line, record in zip(lines, records, strict=True) if record is None])
    for record in filter(None, records):
        key = (record["kind"], record["nimg"])
        if key not in best or record["attempt"] >= best[key]["attempt"]:
            best[key] = record
    return sorted(best.values(), key=lambda record: (record["nimg"], record["kind"]))


def tell_skipped(name: str, lines: list[bytes]) -> None:
    """Say once on stderr how many lines of a metrics.jsonl were skipped. Empty ones do not count."""
    if count := sum(map(bool, lines)):
        print_once(f"{name}: {count} {'lines' if count > 1 else 'line'} cannot be read; skipped")


def last_attempt(path: Path) -> int:
    """The highest attempt in a metrics.jsonl, 0 if there is none."""
    return max((record["attempt"] for record in read_metrics(path)), default=0)


def finite(value: Any) -> float | None:
    """The number, or None for anything else: null, NaN, text."""
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return None
    return float(value) if number else None
