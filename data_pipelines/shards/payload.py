"""Encodes and decodes a sample's image: raw arrays (.npy), PNG, JPEG and WebP. The bytes are not trusted.

An image's size is read from its header and checked before anything of that size is allocated.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence
from functools import cache

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from warm_dist.errors import reason

PAYLOADS = ("npy", "png", "jpg", "webp")
MAX_SIDE = 2048  # pixels, of packed images
MAX_PIXELS = MAX_SIDE**2  # of an image of unknown shape
_JPEG = {"quality": 95, "subsampling": 0}  # 4:4:4; below 64 px halved colour is visible
_WEBP = {"lossless": True, "quality": 75, "method": 4}
_NPY_HEADER = 1024  # bytes; numpy writes 128 for an image
# (bits, colour type) of PNG's IHDR → PIL's mode and raw mode; alpha and 16 bits are not supported, as they would be lost
_PNG = {(1, 0): ("1", "1"), (2, 0): ("L", "L;2"), (4, 0): ("L", "L;4"), (8, 0): ("L", "L"), (8, 2): ("RGB", "RGB"),
        (1, 3): ("P", "P;1"), (2, 3): ("P", "P;2"), (4, 3): ("P", "P;4"), (8, 3): ("P", "P")}  # fmt: skip
# first column and row, and their steps, of the seven passes of an interlaced PNG (its specification, section 8.2)
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PACK = "pack the images instead of indexing them"
_IHDR = struct.Struct(">8s8sIIBBBBB")
_CHUNK = struct.Struct(">I4s")
_SOF = struct.Struct(">BHHB")


def encode(image: NDArray[np.uint8], kind: str) -> bytes:
    """Encode an image (H, W, C) uint8, C 1 or 3, as one of PAYLOADS. npy, png and webp are lossless, jpg has quality 95.

    WebP has no grey: a grey image is decoded as three equal channels.
    """
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
    """The bytes before the pixels in a .npy file of a uint8 array of this shape."""
    buffer = io.BytesIO()
    np.save(buffer, np.empty(shape, np.uint8))
    return buffer.getvalue()[: -math.prod(shape)]


def decode(payload: bytes | memoryview, shape: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """Decode an image to (H, W, C) uint8, possibly read-only; C is 1 for grey images, else 3.

    shape: the required shape (None: any up to MAX_PIXELS). Raises only ValueError or OSError, for an image that is
    truncated, damaged, not 8-bit, or of another shape. Data missing before a JPEG's end marker goes unnoticed, because
    libjpeg fills it with grey; only a checksum finds it.
    """
    if shape is not None:  # raw pixels behind a known header need no parsing
        header = npy_header(tuple(shape))
        if payload[: len(header)] == header and len(payload) == len(header) + math.prod(shape):
            return np.frombuffer(payload, np.uint8, offset=len(header)).reshape(shape)
    start = bytes(payload[:12])
    try:
        if start.startswith(b"\x93NUMPY"):
            image = _decode_npy(payload, shape)
        elif start.startswith(b"\x89PNG\r\n\x1a\n"):
            image = _decode_png(bytes(payload), shape)
        elif start.startswith(b"\xff\xd8"):
            image = _decode_jpeg(payload, shape)
        elif start.startswith(b"RIFF") and start.endswith(b"WEBP"):
            image = _decode_webp(payload, shape)
        else:
            raise ValueError("neither npy nor PNG, JPEG or WebP")
    except (ValueError, OSError):
        raise
    except (struct.error, IndexError):  # read past the end
        raise ValueError("truncated") from None
    except Exception as error:  # numpy's and PIL's parsers raise many types
        raise ValueError(f"{type(error).__name__}: {reason(error)[:100]}") from None
    image = image[..., None] if image.ndim == 2 else image
    if shape is not None and image.shape != tuple(shape):
        raise ValueError(f"shape {image.shape}, where {tuple(shape)} is needed")
    return image


def _check_size(width: int, height: int, shape: Sequence[int] | None) -> None:
    if shape is not None and (height, width) != tuple(shape[:2]):
        raise ValueError(f"{height}x{width} pixels, where {shape[0]}x{shape[1]} are needed")
    if shape is None and (min(height, width) < 1 or height * width > MAX_PIXELS):
        raise ValueError(f"{height}x{width} pixels, where 1 to {MAX_PIXELS} are allowed")


def _decode_npy(payload: bytes | memoryview, shape: Sequence[int] | None) -> NDArray[np.uint8]:
    """Decode .npy; unlike np.load, check the size before allocating."""
    header = io.BytesIO(payload[:_NPY_HEADER])
    try:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        size, fortran_order, dtype = read[np.lib.format.read_magic(header)](header, max_header_size=_NPY_HEADER)
    except Exception as error:
        raise ValueError(f"not a header of a .npy array ({type(error).__name__})") from None
    if dtype != np.uint8 or len(size) not in (2, 3) or (len(size) == 3 and size[2] not in (1, 3)):
        raise ValueError(f"{dtype} array of shape {size}, where uint8 (H, W, 1 or 3) is needed")
    _check_size(size[1], size[0], shape)
    start = header.tell()
    if len(payload) - start != math.prod(size):
        raise ValueError(f"{len(payload) - start} bytes of pixels, where {math.prod(size)} are needed")
    return np.frombuffer(payload, np.uint8, offset=start).reshape(size, order="F" if fortran_order else "C")


def _decode_png(payload: bytes, shape: Sequence[int] | None) -> NDArray[np.uint8]:
    """Parse and inflate here, let PIL undo the filters: PIL's own decoder accepts a truncated stream.

    It is also faster: 117 µs for a photograph of 64x64x3 pixels, 138 with PIL alone.
    """
    _, ihdr, width, height, bits, colour, _, _, interlaced = _IHDR.unpack_from(payload)
    if ihdr != b"\0\0\0\rIHDR" or interlaced > 1:
        raise ValueError("a PNG with a damaged header")
    if (bits, colour) not in _PNG:
        needed = f"at most 8 and grey, RGB or a palette are needed; {_PACK}"
        raise ValueError(f"a PNG of {bits} bits and colour type {colour}, where {needed}")
    _check_size(width, height, shape)
    at, parts, palette = 33, [], b""
    while (chunk := _CHUNK.unpack_from(payload, at))[1] != b"IEND":
        length, name = chunk
        if name == b"IDAT":
            parts.append(payload[at + 8 : at + 8 + length])
        elif name == b"PLTE":
            palette = payload[at + 8 : at + 8 + length]
        at += 12 + length
    inflater = isal_zlib.decompressobj()
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-((x - width) // across), -((y - height) // down)) for x, y, across, down in passes]
    depth = bits * (3 if colour == 2 else 1)
    expected = sum(rows * (1 + (columns * depth + 7) // 8) for columns, rows in sizes if columns)
    try:
        data = inflater.decompress(b"".join(parts), expected + 1)
    except isal_zlib.error as error:  # type: ignore[misc]  # its stubs call it a variable
        raise ValueError(f"a damaged PNG ({error})") from None
    if len(data) != expected or not inflater.eof:
        raise ValueError(f"a damaged PNG: {len(data)} bytes of pixels, where {expected} are needed")
    mode, raw = _PNG[bits, colour]
    image = _pixels(mode, (width, height), _stored(data), "zip", raw, interlaced)
    if mode == "P":
        return np.frombuffer(palette, np.uint8).reshape(-1, 3)[image]
    return image * np.uint8(255) if mode == "1" else image


def _stored(data: bytes) -> bytes:
    """A zlib stream that holds `data` uncompressed (RFC 1950 and 1951, 3.2.4)."""
    parts = [b"\x78\x01"]
    for start in range(0, len(data), 0xFFFF):
        part = data[start : start + 0xFFFF]
        parts += [struct.pack("<BHH", start + len(part) == len(data), len(part), len(part) ^ 0xFFFF), part]
    return b"".join([*parts, struct.pack(">I", isal_zlib.adler32(data))])


def _decode_jpeg(payload: bytes | memoryview, shape: Sequence[int] | None) -> NDArray[np.uint8]:
    """Parse up to the frame header here and let libjpeg (PIL) do the rest: 77 µs, 98 with PIL alone."""
    at = 2
    while True:
        while payload[at] == payload[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker, length = payload[at + 1], payload[at + 2] << 8 | payload[at + 3]
        if payload[at] != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2:
            raise ValueError("a JPEG with a damaged header")
        if marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC):  # two tables and a reserved marker
            break
        at += 2 + length
    bits, height, width, channels = _SOF.unpack_from(payload, at + 4)
    if bits != 8 or channels not in (1, 3):
        raise ValueError(f"a JPEG of {bits} bits and {channels} channels, where 8 and 1 or 3 are needed")
    _check_size(width, height, shape)
    mode = "L" if channels == 1 else "RGB"
    return _pixels(mode, (width, height), bytes(payload), "jpeg", mode, "")


def _pixels(mode: str, size: tuple[int, int], data: bytes, codec: str, *arguments: object) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.frombytes(mode, size, data, codec, *arguments), np.uint8)


def webp_size(payload: bytes | memoryview) -> tuple[int, int]:
    """Width and height in a WebP's header. Raises ValueError if it is damaged."""
    kind, body = bytes(payload[12:16]), bytes(payload[20:30])
    if len(body) < 10:
        raise ValueError("truncated")
    if kind == b"VP8X":
        width, height = (int.from_bytes(body[at : at + 3], "little") + 1 for at in (4, 7))
    elif kind == b"VP8L":
        both = int.from_bytes(body[1:5], "little")
        width, height = (both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (int.from_bytes(body[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    else:
        raise ValueError("a WebP with a damaged header")
    return width, height


def _decode_webp(payload: bytes | memoryview, shape: Sequence[int] | None) -> NDArray[np.uint8]:
    """Check the header, then decode with PIL, whose plugin allocates the canvas when it opens the file."""
    from PIL.WebPImagePlugin import WebPImageFile

    width, height = webp_size(payload)
    _check_size(width, height, shape)
    picture = WebPImageFile(io.BytesIO(payload))
    if picture.mode != "RGB" or picture.size != (width, height):
        raise ValueError(f"a WebP of {picture.mode} pixels, where RGB are needed; {_PACK}")
    return np.asarray(picture)
