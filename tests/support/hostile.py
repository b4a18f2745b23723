"""Tars and manifests made to hurt."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_pipelines.reading.loader import Loader
from data_pipelines.shards.manifest import NAME, UNCERTIFIED, Manifest
from warm_dist.store.folder import FolderStore

BLOCK = tarfile.BLOCKSIZE


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A tar header and its content."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)


def checksummed(data: bytes) -> bytes:
    """Every header of a tar gets its right checksum again, so that the damage is believed."""
    out = bytearray(data)
    for start in range(0, len(out) - BLOCK + 1, BLOCK):
        header = out[start : start + BLOCK]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            out[start + 148 : start + 156] = f"{sum(header):06o}\0 ".encode()
    return bytes(out)


END = bytes(2 * BLOCK)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None], **columns: Any) -> bytes:
    """The folder's manifest with a changed header and other columns."""
    table = pq.read_table(folder / NAME)
    header = json.loads(table.schema.metadata[b"warm-dist"]) | {"version": UNCERTIFIED}  # who lies needs no digest
    change(header)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"warm-dist": json.dumps(header)}), buffer)
    return buffer.getvalue()


def reader(manifest: Manifest, folder: Path) -> Loader:
    store = FolderStore(folder)
    options = {"batch_size": 8, "num_lanes": 8, "seed": 0, "rank": 0, "world": 1, "chunk": 4, "window": 8}
    return Loader(manifest, store, **options, threads=1, buffer_bytes=1 << 20)
