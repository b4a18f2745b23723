"""Decodes an image file and resizes it to a square, reproducibly: box, Lanczos, or ADM's center crop for ImageNet."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.shards.payload import webp_size
from data_pipelines.sources.pictures import FORMATS
from warm_dist.errors import reason

if TYPE_CHECKING:
    from PIL import Image

RESIZE = ("box", "lanczos", "adm")
MAX_BYTES = 1 << 30  # 89 million pixels, more than most cameras have
_PNG = b"\x89PNG\r\n\x1a\n"


LFS = b"version https://git-lfs"
LFS_REASON = "a Git LFS pointer in place of the file: run `git lfs pull`"
_PIXEL_BYTES = {"WEBP": 16, "JPEG2000": 24}  # measured peaks; in their decoders' own buffers too
_THREE_COPIES = 12  # bytes a pixel of others, at most 4 each: as loaded, turned or laid on white, cropped
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_TURNED_BY = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may hold an orientation
_TEXT_BYTES = 1 << 20  # PIL's own limit for a text, unpacked
_CHUNK = struct.Struct(">I4s")


class Transform(NamedTuple):
    """How to resize. resolution: height = width, pixels. resize: one of RESIZE. max_bytes: that decoding may take."""

    resolution: int
    resize: str = "box"
    max_bytes: int = MAX_BYTES


def decode_image(data: bytes, transform: Transform) -> NDArray[np.uint8]:
    """Decode an image file to (resolution, resolution, 3) uint8, with transparency on white.

    "box" and "lanczos" apply the EXIF orientation and filter the central square in one step. "adm" is the recipe of the
    published ImageNet models (Dhariwal, Nichol, arXiv 2105.05233): as stored, halved by box filters while it is at
    least twice too large, then bicubic, then cropped. Of several frames the first counts. Raises ValueError for a file that
    is damaged, not an image, deeper than 8 bits, or would take more than transform.max_bytes.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise ValueError("empty")
    try:
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":  # PIL allocates its canvas when it opens the file
            _check_size(webp_size(data), "WEBP", transform.max_bytes)
        source = io.BytesIO(_without_texts(data) if data.startswith(_PNG) else data)
        Image.MAX_IMAGE_PIXELS = None  # a bound of PIL's own, in pixels; ours is in bytes
        picture: Image.Image = Image.open(source, formats=FORMATS)
        _check_size(picture.size, picture.format, transform.max_bytes)
        picture.load()
        if transform.resize != "adm":
            with suppress(Exception):  # metadata that nobody can read turn nothing
                ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"{picture.mode} pixels; convert the image to 8 bits a channel")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return fit(picture if picture.mode == "RGB" else picture.convert("RGB"), transform)
    except UnidentifiedImageError:
        raise ValueError(LFS_REASON if data.startswith(LFS) else "no picture of a known format") from None
    except Exception as error:  # PIL's plugins raise many types on damaged files
        raise ValueError(reason(error)) from None


def _check_size(size: tuple[int, int], kind: str | None, max_bytes: int) -> None:
    needed = size[0] * size[1] * _PIXEL_BYTES.get(kind or "", _THREE_COPIES)
    if needed > max_bytes:
        taken, allowed = -(-needed >> 20), max_bytes >> 20
        raise ValueError(f"{size[0]}x{size[1]} pixels would take {taken} MB, --max-decoded-mb allows {allowed}")


def _without_texts(png: bytes) -> bytes:
    """A PNG without its texts and colour profile, which PIL refuses if they are large; texts with an orientation stay."""
    kept, at = [png[:8]], 8
    while at + 12 <= len(png):
        length, name = _CHUNK.unpack_from(png, at)
        body = png[at + 8 : at + 8 + length] if name in _TEXTS else b""
        if name not in _TEXTS or (body.startswith(_TURNED_BY) and _fits(name, body)):
            kept.append(png[at : at + 12 + length])
        at += 12 + length
    return b"".join([*kept, png[at:]])


def _fits(name: bytes, body: bytes) -> bool:
    """Whether a text chunk unpacks to what PIL allows."""
    if name == b"tEXt":
        return len(body) <= _TEXT_BYTES
    keyword = body.index(b"\0")
    if name == b"iTXt" and body[keyword + 1 : keyword + 2] != b"\1":  # not compressed
        return len(body) <= _TEXT_BYTES
    packed = body[keyword + 2 :] if name == b"zTXt" else body[keyword + 3 :].split(b"\0", 2)[-1]
    try:
        unpacker = zlib.decompressobj()
        unpacker.decompress(packed, _TEXT_BYTES)
    except zlib.error:
        return False
    return unpacker.eof


def fit(picture: Image.Image, transform: Transform) -> NDArray[np.uint8]:
    """Crop an RGB or grey image to its center and resize it to (resolution, resolution, C) uint8."""
    from PIL.Image import Resampling

    size = transform.resolution
    if transform.resize == "adm":
        while min(picture.size) >= 2 * size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Resampling.BOX)
        scale = size / min(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Resampling.BICUBIC)
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    else:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        resampling = Resampling.LANCZOS if transform.resize == "lanczos" else Resampling.BOX
        # cropped first, because resize's box argument lets pixels outside the box into the filter
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size), resampling)
    pixels = np.array(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]
