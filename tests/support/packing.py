"""Made-up sources and foreign shards to pack, and what a folder then holds."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.shards.manifest import Manifest
from data_pipelines.sources.base import BadImage, Sample, Source
from data_pipelines.verify import verify


def noise_source(count: int, size: int = 8, channels: int = 3, bad: tuple[int, ...] = ()) -> Source:
    def part(start: int, stop: int) -> Iterator[Sample | BadImage]:
        for number in range(start, stop):
            if number in bad:
                yield BadImage(f"n{number}", "cut short")
            else:
                pixels = np.random.default_rng(number).integers(0, 256, (size, size, channels), np.uint8)
                yield Sample(f"folder.v2/n{number}.png", number % 3, pixels // (1 + number % 2))

    return Source(count, ("a", "b", "c"), "made up", part)


def damages(manifest: Manifest, url: str, endpoint_url: str | None = None, workers: int = 1) -> list[str]:
    return [line for found in verify(manifest, url, endpoint_url, workers) for line in found]


def contents(folder: Path) -> dict[str, str]:
    """Relative path → sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def foreign_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(seed: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
