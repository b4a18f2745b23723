"""A sample's bytes and its pixels: raw arrays (.npy), PNG, JPEG and WebP. Nothing that decodes is trusted."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

PAYLOADS = ("npy", "png", "jpg", "webp")
_JPEG = {"quality": 95, "subsampling": 0}  # 4:4:4; below 64 px halved colour is visible
_WEBP = {"lossless": True, "quality": 75, "method": 4}


def encode(image: NDArray[np.uint8], kind: str) -> bytes:
    """(H, W, C) uint8, C 1 or 3 → bytes of one of PAYLOADS. npy, png and webp are lossless, jpg has quality 95."""
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, image)
    else:
        from PIL import Image

        options = {"png": ("PNG", {}), "jpg": ("JPEG", _JPEG), "webp": ("WEBP", _WEBP)}[kind]
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, options[0], **options[1])
    return buffer.getvalue()


@cache
def npy_header(shape: tuple[int, ...]) -> bytes:
    """The bytes before the pixels in `np.save` of a uint8 array of this shape."""
    buffer = io.BytesIO()
    np.save(buffer, np.empty(shape, np.uint8))
    return buffer.getvalue()[: -math.prod(shape)]


def decode(payload: bytes | memoryview, shape: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """A sample's bytes → (H, W, C) uint8; C is 1 for grey images, else 3.

    shape: what it must be (None: whatever it is). Raises ValueError or OSError if it is damaged, not an 8-bit image, or
    of another shape.
    """
    if shape is not None:  # raw pixels behind a known header need no parsing
        header = npy_header(tuple(shape))
        if payload[: len(header)] == header and len(payload) == len(header) + math.prod(shape):
            return np.frombuffer(payload, np.uint8, offset=len(header)).reshape(shape)
    image: NDArray[np.uint8]
    try:
        if payload[:6] == b"\x93NUMPY":
            image = np.load(io.BytesIO(payload), allow_pickle=False)
        else:
            image = _decode_picture(payload)
    except (SyntaxError, EOFError) as error:  # what PIL's plugins and numpy raise besides OSError and ValueError
        raise ValueError(f"{type(error).__name__}: {error}") from None
    image = image[..., None] if image.ndim == 2 else image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"{image.dtype} array of shape {image.shape}, where uint8 (H, W, 1 or 3) is needed")
    if shape is not None and image.shape != tuple(shape):
        raise ValueError(f"shape {image.shape}, where {tuple(shape)} is needed")
    return image


def _decode_picture(payload: bytes | memoryview) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        picture: Image.Image = Image.open(io.BytesIO(payload))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    if picture.mode not in ("1", "L", "P", "RGB"):
        raise ValueError(f"{picture.mode} pixels, where L or RGB are needed; pack the images instead of indexing them")
    return np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
