"""Decodes an image file and resizes it to a square, reproducibly: box, Lanczos, or ADM's center crop for ImageNet."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

RESIZE = ("box", "lanczos", "adm")


class Transform(NamedTuple):
    """How to resize. resolution: height = width, pixels. resize: one of RESIZE."""

    resolution: int
    resize: str = "box"


def decode_image(data: bytes, transform: Transform) -> NDArray[np.uint8]:
    """Decode an image file to (resolution, resolution, 3) uint8, with transparency on white.

    "box" and "lanczos" apply the EXIF orientation and filter the central square in one step. "adm" is the recipe of the
    published ImageNet models (Dhariwal, Nichol, arXiv 2105.05233): as stored, halved by box filters while it is at
    least twice too large, then bicubic, then cropped. Raises ValueError for a file that is damaged, not an image, deeper
    than 8 bits, or a decompression bomb (twice PIL's MAX_IMAGE_PIXELS).
    """
    from PIL import Image, ImageOps

    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
        picture.load()
        if transform.resize != "adm":
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"{picture.mode} pixels; convert the image to 8 bits a channel")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return fit(picture.convert("RGB"), transform)
    except Exception as error:  # PIL's plugins raise many types on damaged files
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


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
