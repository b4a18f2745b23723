"""One checkpoint format: flat float32 fragments in safetensors, one file a rank, COMPLETE written last. No pickle.

It loads at any world size and ZeRO stage, and bit-exactly at the same ones. A folder `checkpoints/000016000` holds
rank_K.safetensors (keys KIND/NAME@START), rank_K.done (size, sha256) and COMPLETE (what it was made of).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from warm_dist.distributed import World, gather, on_main
from warm_dist.ema import EMA
from warm_dist.engine import STATE, Engine
from warm_dist.errors import CheckpointError, OutputError
from warm_dist.metrics import read_json, write_json


def folder_of(root: Path, nimg: int) -> Path:
    return root / f"{nimg:012d}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def save(root: Path, world: World, engine: Engine, ema: EMA, nimg: int, num_steps: int, meta: dict[str, Any]) -> Path:
    """Write the state at `nimg` as a whole or not at all. A collective.

    Raises OutputError on every rank if one of them cannot write; the folder then has no COMPLETE and is not used.
    """
    folder = folder_of(root, nimg)
    tensors = {f"{key}/{f.name}@{f.start}": getattr(f, key) for f in engine.owned() for key in STATE}
    tensors |= {f"ema/{f.name}@{f.start}": v for f, v in zip(ema.fragments, ema.values, strict=True)}
    needed = sum(t.numel() * 4 for t in tensors.values()) * world.size  # the folder is shared

    def prepare() -> None:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror})") from None

    on_main(world, prepare)
    name, failure, done = f"rank_{world.rank}.safetensors", None, None
    try:
        free = shutil.disk_usage(folder).free
        if free < needed * 1.1:
            raise OutputError(f"{folder}: {needed:,} bytes to write, {free:,} free")
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, folder / name)
        done = {"file": name, "bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        write_json(folder / f"rank_{world.rank}.done", done)
    except (OSError, SafetensorError, OutputError) as error:
        failure = str(error)
    reports = gather(world, (done, failure))
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(reports) if text]
    if failures:
        raise OutputError(f"checkpoint at nimg {nimg} not saved; " + "; ".join(failures))

    def complete() -> None:
        tree = {"format": 1, "nimg": nimg, "num_steps": num_steps, **meta, "files": [done for done, _ in reports]}
        write_json(folder / "COMPLETE", tree)

    on_main(world, complete)
    return folder


def prune(root: Path, keep_last: int) -> None:
    """Remove all complete checkpoints but the last ones; COMPLETE goes first, so none is ever half a checkpoint."""
    for folder in complete_folders(root)[:-keep_last]:
        (folder / "COMPLETE").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def complete_folders(root: Path) -> list[Path]:
    """Folders with COMPLETE, oldest first."""
    return sorted(path.parent for path in root.glob("[0-9]*/COMPLETE")) if root.is_dir() else []


def inspect(folder: Path) -> dict[str, Any]:
    """COMPLETE's content after every file was found with its size and sha256. Raises CheckpointError."""
    meta = read_json(folder / "COMPLETE")
    if not isinstance(meta, dict) or meta.get("format") != 1:
        raise CheckpointError(f"{folder}: COMPLETE is not readable, or of an unknown format")
    for file in meta["files"]:
        path = folder / file["file"]
        if not path.exists():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != file["bytes"] or sha256(path) != file["sha256"]:
            raise CheckpointError(f"{path}: differs from what COMPLETE says was written")
    return meta


def latest(root: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint, or None if there has never been one; damaged ones are passed over with a warning.

    Raises CheckpointError if there are complete checkpoints and none is intact: never a silent fresh start.
    """
    folders = complete_folders(root)
    problems = []
    for folder in reversed(folders):
        try:
            return folder, inspect(folder)
        except CheckpointError as error:
            problems.append(str(error))
            warn(f"checkpoint passed over: {error}")
    if problems:
        raise CheckpointError(
            f"{root}: no intact checkpoint ({'; '.join(problems)}); remove the folder to start afresh"
        )
    return None


def _parse(key: str) -> tuple[str, str, int]:
    kind, rest = key.split("/", 1)
    name, start = rest.rsplit("@", 1)
    return kind, name, int(start)


def _pieces(folder: Path, meta: dict[str, Any]) -> Iterator[tuple[str, str, int, Any, int]]:
    """(kind, name, start, lazy slice, numel) of every fragment, file after file."""
    for entry in meta["files"]:
        try:
            with safe_open(folder / entry["file"], framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # not a dict
                    part = file.get_slice(key)
                    yield *_parse(key), part, part.get_shape()[0]
        except SafetensorError as error:
            raise CheckpointError(f"{folder / entry['file']}: {error}") from None


@torch.no_grad()
def load(folder: Path, meta: dict[str, Any], engine: Engine, ema: EMA) -> None:
    """Fill the engine's and the EMA's fragments from a checkpoint of any world size and stage, fragment by fragment.

    Raises CheckpointError if a value of this rank is not in it.
    """
    wanted: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    for f in engine.fragments():
        for key in STATE:
            wanted.setdefault((key, f.name), []).append((f.start, getattr(f, key)))
    for f, value in zip(ema.fragments, ema.values, strict=True):
        wanted.setdefault(("ema", f.name), []).append((f.start, value))
    missing = {key: sum(target.numel() for _, target in targets) for key, targets in wanted.items()}
    for kind, name, start, part, numel in _pieces(folder, meta):
        for target_start, target in wanted.get((kind, name), []):
            low, high = max(start, target_start), min(start + numel, target_start + target.numel())
            if low < high:
                target[low - target_start : high - target_start].copy_(part[low - start : high - start])
                missing[kind, name] -= high - low
    absent = [f"{kind}/{name}" for (kind, name), count in missing.items() if count]
    if absent:
        raise CheckpointError(f"{folder}: lacks {len(absent)} of this network's tensors, first {absent[0]}")
    engine.loaded(meta["num_steps"])


def export(
    folder: Path, meta: dict[str, Any], kind: str, shapes: dict[str, torch.Size], path: Path, metadata: dict[str, str]
) -> None:
    """Write whole tensors of one kind ("ema" or "master") as one safetensors file, holding one tensor at a time.

    Raises CheckpointError if the checkpoint lacks a value, OutputError if the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + 4 * shape.numel()]}
        offset += 4 * shape.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned to 8 bytes
    base = 8 + len(text)
    missing = {name: shape.numel() for name, shape in shapes.items()}
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(base + offset)
            for piece_kind, name, start, part, numel in _pieces(folder, meta):
                if piece_kind == kind and name in shapes:
                    out.seek(base + header[name]["data_offsets"][0] + 4 * start)
                    out.write(part[:].numpy().tobytes())
                    missing[name] -= numel
        absent = [name for name, count in missing.items() if count]
        if absent:
            raise CheckpointError(f"{folder}: lacks {kind}/{absent[0]}")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
