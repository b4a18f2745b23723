"""From a picture file to a square: pixels that a direct computation confirms."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.sources.transform import Transform, decode_image
from tests.support.pictures import encode, noise


def test_pixels_are_cropped_to_the_center_and_box_averaged() -> None:
    pixels = noise(1, height=16, width=24)
    expected = pixels[:, 4:20].reshape(8, 2, 8, 2, 3).mean((1, 3))
    # PIL rounds each of its two passes
    assert np.abs(decode_image(encode(pixels), Transform(8)) - expected).max() <= 1


def test_transparency_is_laid_on_white_and_grey_becomes_rgb() -> None:
    transparent = np.zeros((8, 8, 4), np.uint8)
    transparent[:4] = (10, 20, 30, 255)
    image = decode_image(encode(transparent), Transform(8))
    assert (image[:4] == (10, 20, 30)).all()
    assert (image[4:] == 255).all()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(decode_image(encode(grey), Transform(8)), np.repeat(grey[..., None], 3, axis=2))


def test_exif_orientation_is_applied() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = decode_image(encode(pixels, "JPEG", exif=exif.tobytes(), quality=95), Transform(16))
    assert image[12].mean() > 200 > 50 > image[3].mean()


def test_lanczos_is_the_sinc_of_three_lobes() -> None:
    pixels = noise(2, 32, 48)
    distance = ((np.arange(32) + 0.5) - (np.arange(8)[:, None] + 0.5) * 4) / 4
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("yh,xw,hwc->yxc", weights, weights, pixels[:, 8:40].astype(float))
    # PIL rounds and clips after each of its two passes
    assert np.abs(decode_image(encode(pixels), Transform(8, "lanczos")) - expected.clip(0, 255)).max() <= 2


def test_adm_halves_then_scales_the_shorter_side_then_crops() -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (192, 256, 3))
    image = decode_image(encode(ramp), Transform(64, "adm"))
    # 256 x 192 is halved once, since 96 < 2 · 64; then 85 x 64, of which columns 10 to 73 stay; a ramp stays a ramp
    expected = (np.arange(64) + 10 + 0.5) * 256 / 85 - 0.5
    assert image.shape == (64, 64, 3)
    assert np.abs(image - expected[None, :, None]).max() <= 1
    exact = noise(3, 128, 128)
    means = exact.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(decode_image(encode(exact), Transform(64, "adm")) - means).max() <= 1


def test_adm_takes_pictures_as_they_are_stored() -> None:
    """Fault: `adm` turns pictures by their EXIF orientation, which ADM's own code does not."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    image = decode_image(encode(pixels, "JPEG", exif=exif.tobytes(), quality=95), Transform(16, "adm"))
    assert image[3].mean() > 200 > 50 > image[12].mean()


@pytest.mark.parametrize("resize", ["box", "lanczos", "adm"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (7, 8), (64, 64), (65, 63), (400, 130)])
def test_every_shape_becomes_the_square_asked_for(resize: str, height: int, width: int) -> None:
    image = decode_image(encode(np.full((height, width, 3), 77, np.uint8)), Transform(16, resize))
    assert image.shape == (16, 16, 3)
    assert (image == 77).all()


def test_cmyk_and_palettes_become_rgb() -> None:
    cmyk = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).convert("CMYK").save(cmyk, "JPEG", quality=95)
    assert decode_image(cmyk.getvalue(), Transform(16)).max() <= 4
    palette = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).quantize(4).save(palette, "GIF")
    assert (decode_image(palette.getvalue(), Transform(16)) == 200).all()


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    header = encode(np.zeros((1, 1), np.uint8))
    wide = bytearray(header)
    wide[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in IHDR
    import zlib

    wide[29:33] = zlib.crc32(wide[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match="bomb"):
        decode_image(bytes(wide), Transform(8))
