"""Exported weights as bytes: one safetensors file of published tensors, with a digest of the whole file in it."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from warm_dist.checkpoints.format import FORMAT, Fragment, Saved, header_of, index_of, read_fragments
from warm_dist.errors import CheckpointError, ConfigError
from warm_dist.files import open_regular, replace_file
from warm_dist.networks.flat import Published

_ZEROS = "0" * 64
_DIGEST = re.compile(rb'\{"__metadata__": \{"sha256": "([0-9a-f]{64})"')
_MOST_HEADER = 100 << 20  # as safetensors itself

Part = tuple[Saved, str, float]
"""A checkpoint or snapshot, a kind of tensors in it, and their factor in a sum."""


def export_tensors(parts: list[Part], tensors: Sequence[Published], path: Path, metadata: dict[str, str]) -> None:
    """Write the weighted sum of the parts as one safetensors file of published tensors, holding one block at a time.

    tensors: all of the network's, block by block. Raises CheckpointError if a part lacks a value, OutputError if the
    file cannot be written. Its metadata begins with `sha256`, the digest of the file with zeros in that place.
    """
    layouts = [_layout(saved, kind) for saved, kind, _ in parts]
    shapes = {tensor.name: tensor.piece.shape for tensor in tensors}
    header, _ = header_of(shapes, {"sha256": _ZEROS, **metadata})

    def fill(temporary: Path) -> None:
        digest = hashlib.sha256(header)
        with temporary.open("wb") as out:
            out.write(header)
            for _, block in groupby(tensors, key=lambda tensor: tensor.flat):
                members = list(block)
                total = torch.zeros(members[-1].stop, dtype=torch.float64)
                for part, layout in zip(parts, layouts, strict=True):
                    total += part[2] * _whole(part, layout, members)
                for tensor in members:
                    values = tensor.piece.publish(total[tensor.start : tensor.stop]).float()
                    data = values.view(-1).numpy().data.cast("B")
                    digest.update(data)
                    out.write(data)
            out.seek(header.index(_ZEROS.encode()))
            out.write(digest.hexdigest().encode())

    replace_file(path, fill)


def _whole(part: Part, layout: Layout, members: list[Published]) -> Tensor:
    """All elements of one flat parameter, (n,) float64, from a checkpoint of either format."""
    if part[0].meta["format"] == FORMAT:
        return _stored(part, layout, members[0].flat, members[-1].stop)
    return torch.cat([tensor.piece.adopt(_stored(part, layout, tensor.name, tensor.piece.numel)) for tensor in members])


def _stored(part: Part, layout: Layout, name: str, count: int) -> Tensor:
    """All `count` elements under one name, (count,) float64, put together from their fragments."""
    saved, kind, _ = part
    out, missing = torch.empty(count, dtype=torch.float64), count
    for file, stored in layout.get(name, ()):
        for tensor, values in read_fragments(saved, file, [stored]):
            out[tensor.start : tensor.stop] = values
            missing -= len(values)
    if missing:
        raise CheckpointError(f"{saved}: lacks {kind}/{name}")
    return out


Layout = dict[str, list[tuple[str, Fragment]]]
"""Parameter name → its fragments and the file of each."""


def _layout(saved: Saved, kind: str) -> Layout:
    """Raises ConfigError if no tensor is of this kind."""
    out: Layout = {}
    kinds = set()
    for file in saved.meta["files"]:
        for tensor in index_of(saved, file):
            kinds.add(tensor.kind)
            if tensor.kind == kind:
                out.setdefault(tensor.name, []).append((file["file"], tensor))
    if not out:
        weights = sorted(other for other in kinds if other == "master" or other.startswith("ema"))
        raise ConfigError(f"{saved}: has no weights {kind!r}; it has {', '.join(weights)}")
    return out


def is_certified(path: Path) -> bool:
    """Whether a weights file has a digest, which is then the right one.

    Raises CheckpointError if it is another, OSError if the file cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = file.read(min(length, _MOST_HEADER))
        found = _DIGEST.match(header)
        if found is None:
            return False
        digest = hashlib.sha256(start + header[: found.start(1)] + _ZEROS.encode() + header[found.end(1) :])
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest().encode() != found[1]:
        raise CheckpointError(f"{path}: differs from what was written (another sha256); export it or copy it again")
    return True
