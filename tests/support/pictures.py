"""Noise as pixels and as files of pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from data_pipelines.sources.base import Sample, Source


def encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 8, width: int | None = None) -> np.ndarray:
    """(height, width, 3) uint8, a square if no width is given."""
    return np.random.default_rng(seed).integers(0, 256, (height, width or height, 3), np.uint8)


def good(source: Source) -> list[Sample]:
    """The source's samples without its bad images."""
    return [item for item in source if isinstance(item, Sample)]
