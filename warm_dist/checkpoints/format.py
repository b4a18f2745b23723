"""One checkpoint format: flat float32 fragments in safetensors, one file a rank, COMPLETE written last. No pickle.

It loads at any world size and ZeRO stage, and bit-exactly at the same ones. `checkpoints/000016000` holds
rank_K.safetensors (tensors KIND/NAME@START), rank_K.done (their offsets and sha256) and COMPLETE (the run's metadata
and the sha256 of every .done). It is read through a Store, so a folder and S3 are alike.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from warm_dist.errors import AccessError, CheckpointError, DataError, OutputError, writing
from warm_dist.files import sync, write_json
from warm_dist.networks.flat import Published
from warm_dist.records import DamagedError, Record, unseal
from warm_dist.store.base import Store

FORMAT = 3
PUBLISHED = 2  # an older format: its fragments are of the published tensors, in their own names and orders
COMPLETE = "COMPLETE"
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"  # the whole state, pruned; some EMAs, never pruned
_GET_BYTES = 32 << 20  # most bytes of adjacent tensors in one read


class RankFile(Record):
    """One rank's file in a checkpoint. sha256: of `done`, which has those of the tensors."""

    file: Annotated[str, Field(pattern=r"^rank_\d+\.safetensors$")]
    bytes: Annotated[int, Field(ge=0)]
    done: Annotated[str, Field(pattern=r"^rank_\d+\.done$")]
    sha256: str


class Complete(Record):
    """The content of COMPLETE. window: a checkpoint's sums of metrics since the last log, by rank."""

    format: Literal[2, 3]
    nimg: Annotated[int, Field(ge=0)]
    num_steps: Annotated[int, Field(ge=0)]
    fingerprint: str
    config: dict[str, Any]
    world_size: Annotated[int, Field(ge=1)] | None = None
    data: dict[str, Any]
    window: tuple[tuple[float, ...], ...] = ()
    files: Annotated[tuple[RankFile, ...], Field(min_length=1)]


class Done(Record):
    """The content of rank_K.done. tensors: KIND/NAME@START → (offset and length in the file, bytes, sha256)."""

    file: str
    bytes: int
    tensors: dict[str, tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], str]]


class Saved(NamedTuple):
    """A complete checkpoint or snapshot: its store, its name there, and the content of COMPLETE."""

    store: Store
    name: str
    meta: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.store.url}/{self.name}"


def name_of(group: str, nimg: int) -> str:
    """The name, such as `checkpoints/000000016000`; names sort by nimg."""
    return f"{group}/{nimg:012d}"


def nimg_of(name: str) -> int:
    """The inverse of `name_of`."""
    return int(name.rpartition("/")[2])


def write_rank(folder: Path, rank: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write rank_K.safetensors and rank_K.done, with one tensor at a time on the host; returns the entry for COMPLETE.

    Raises OutputError, and then leaves neither file behind.
    """
    path, done = folder / f"rank_{rank}.safetensors", folder / f"rank_{rank}.done"
    header, size = header_of({key: (tensor.numel(),) for key, tensor in tensors.items()}, {})
    index: dict[str, tuple[int, int, str]] = {}
    try:
        with path.open("wb") as out:
            out.write(header)
            for key, tensor in tensors.items():
                data = tensor.detach().cpu().contiguous().numpy().data.cast("B")
                index[key] = out.tell(), len(data), _digest(data)
                out.write(data)
        sync(path)
        write_json(done, {"file": path.name, "bytes": size, "tensors": index})
    except (OSError, OutputError) as error:
        for part in (path, done):
            with suppress(OSError):
                part.unlink(missing_ok=True)
        if isinstance(error, OutputError):
            raise
        with writing(path):
            raise
    return {"file": path.name, "bytes": size, "done": done.name, "sha256": _digest(done.read_bytes())}


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def header_of(shapes: Mapping[str, Sequence[int]], metadata: dict[str, str]) -> tuple[bytes, int]:
    """The header of a safetensors file of float32 tensors in this order, and the size of the whole file, bytes."""
    tree: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape))
        tree[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + offset


def complete_names(store: Store, group: str) -> list[str]:
    """Names of the complete checkpoints or snapshots in a store, oldest first."""
    found = (path.rpartition("/") for path in store.list(f"{group}/"))
    return sorted(name for name, _, file in found if file == COMPLETE and name.rpartition("/")[2].isdigit())


def open_saved(store: Store, name: str) -> Saved:
    """Read the metadata of a complete checkpoint or snapshot. Raises CheckpointError if COMPLETE is not valid."""
    where = f"{store.url}/{name}/{COMPLETE}"
    try:
        data = store.read(f"{name}/{COMPLETE}")
        complete = unseal(data, Complete)
    except (DataError, AccessError) as error:
        raise CheckpointError(str(error)) from None
    except DamagedError as error:
        other = re.match(rb'\{\s*"format": (\d+)', data)
        known = f"of format {other[1].decode()}, this version reads formats {PUBLISHED} and {FORMAT}" if other else ""
        raise CheckpointError(
            f"{where}: {known if other and int(other[1]) not in (PUBLISHED, FORMAT) else error}"
        ) from None
    if complete.nimg != nimg_of(name):
        raise CheckpointError(f"{where}: is of nimg {complete.nimg}")
    return Saved(store, name, complete.model_dump())


class Fragment(NamedTuple):
    """A stored fragment: elements start … stop - 1 of a parameter, at offset … end - 1 in its file, bytes."""

    kind: str
    name: str
    start: int
    offset: int
    size: int
    sha256: str

    @property
    def stop(self) -> int:
        return self.start + self.size // 4

    @property
    def end(self) -> int:
        return self.offset + self.size


Wanted = Callable[[str, str, int, int], bool]
"""(kind, name, start, stop) of a stored fragment → whether it is needed."""


def index_of(saved: Saved, file: dict[str, Any]) -> list[Fragment]:
    """The fragments in a rank's file, in their order."""
    where = f"{saved}/{file['done']}"
    try:
        text = saved.store.read(f"{saved.name}/{file['done']}")
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if _digest(text) != file["sha256"]:
        raise CheckpointError(f"{where}: differs from what COMPLETE says was written")
    try:
        done = unseal(text, Done)
    except DamagedError as error:
        raise CheckpointError(f"{where}: {error}") from None
    out = []
    for key, (offset, size, sha256) in done.tensors.items():
        kind, _, rest = key.partition("/")
        name, _, start = rest.rpartition("@")
        out.append(Fragment(kind, name, int(start), offset, size, sha256))
    return out


def _pieces(saved: Saved, files: Iterable[dict[str, Any]], wanted: Wanted) -> Iterator[tuple[Fragment, Tensor]]:
    """Each wanted fragment with its values (n,) float32, checked against its hash; adjacent ones share a read."""
    for file in files:
        run: list[Fragment] = []
        for tensor in [t for t in index_of(saved, file) if wanted(t.kind, t.name, t.start, t.stop)]:
            if run and (run[-1].end != tensor.offset or tensor.end - run[0].offset > _GET_BYTES):
                yield from read_fragments(saved, file["file"], run)
                run = []
            run.append(tensor)
        if run:
            yield from read_fragments(saved, file["file"], run)


def read_fragments(saved: Saved, file: str, run: list[Fragment]) -> Iterator[tuple[Fragment, Tensor]]:
    begin, end = run[0].offset, run[-1].end
    try:
        data = memoryview(bytearray(saved.store.read(f"{saved.name}/{file}", begin, end - begin)))
    except DataError as error:
        raise CheckpointError(str(error)) from None
    for tensor in run:
        part = data[tensor.offset - begin : tensor.end - begin]
        if _digest(part) != tensor.sha256:
            key = f"{tensor.kind}/{tensor.name}@{tensor.start}"
            raise CheckpointError(f"{saved}/{file}: {key} differs from what was written")
        yield tensor, torch.frombuffer(part, dtype=torch.float32) if tensor.size else torch.empty(0)


Targets = dict[tuple[str, str], list[tuple[int, Tensor]]]
"""(kind, parameter name) → (start, flat float32 tensor to fill with the parameter's elements from there on)."""


@torch.no_grad()
def load_saved(saved: Saved, rank: int, targets: Targets, tensors: Iterable[Published]) -> None:
    """Fill the targets from a checkpoint of any world size, ZeRO stage and format.

    tensors: the network's published tensors, by which checkpoints of the older format are named. Raises as `_load`.
    """
    if saved.meta["format"] == FORMAT:
        _load(saved, rank, targets)
    else:
        _load_published(saved, rank, targets, tensors)


def _load_published(saved: Saved, rank: int, targets: Targets, tensors: Iterable[Published]) -> None:
    by_flat: dict[str, list[Published]] = {}
    for tensor in tensors:
        by_flat.setdefault(tensor.flat, []).append(tensor)
    for kind in dict.fromkeys(kind for kind, _ in targets):
        wanted = [  # one kind at a time: the whole tensors are a copy of this rank's part of it
            (tensor, start, target)
            for (k, name), group in targets.items()
            for start, target in group
            for tensor in by_flat.get(name, ())
            if k == kind and tensor.start < start + target.numel() and start < tensor.stop
        ]
        whole = {tensor.name: torch.empty(tensor.piece.numel) for tensor, _, _ in wanted}
        _load(saved, rank, {(kind, name): [(0, values)] for name, values in whole.items()})
        for tensor, start, target in wanted:
            first, last = max(tensor.start, start), min(tensor.stop, start + target.numel())
            elements = tensor.piece.adopt(whole[tensor.name])
            target[first - start : last - start] = elements[first - tensor.start : last - tensor.start]


def _load(saved: Saved, rank: int, targets: Targets) -> None:
    """Fill the targets, piece by piece, by the names in the files.

    All values used are checked against their hashes. The same rank's file is read first: at an equal world size and
    stage it holds everything. Raises CheckpointError if anything is damaged or missing; the state is then undefined.
    """
    missing = {key: sum(target.numel() for _, target in group) for key, group in targets.items()}

    def wanted(kind: str, name: str, start: int, stop: int) -> bool:
        group = targets.get((kind, name), ()) if missing.get((kind, name)) else ()
        return any(low < stop and start < low + target.numel() for low, target in group)

    files = saved.meta["files"]
    mine = rank % len(files)
    needed = (file for file in files[mine:] + files[:mine] if any(missing.values()))  # lazy: until nothing is missing
    for tensor, values in _pieces(saved, needed, wanted):
        for low, target in targets[tensor.kind, tensor.name]:
            first, last = max(tensor.start, low), min(tensor.stop, low + target.numel())
            if first < last:
                target[first - low : last - low].copy_(values[first - tensor.start : last - tensor.start])
                missing[tensor.kind, tensor.name] -= last - first
    absent = [f"{kind}/{name}" for (kind, name), count in missing.items() if count]
    if absent:
        raise CheckpointError(f"{saved}: lacks {len(absent)} of this network's tensors, first {absent[0]}")
