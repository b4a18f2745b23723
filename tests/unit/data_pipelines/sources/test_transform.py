"""From a picture file to a square: pixels that a direct computation confirms."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

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


def bomb(kind: str, side: int) -> bytes:
    """A small file whose header claims a square of `side`."""
    data = bytearray(encode(np.zeros((1, 1, 3), np.uint8), kind))
    if kind == "PNG":
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif kind == "GIF":
        data[6:10] = side.to_bytes(2, "little") * 2
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = side.to_bytes(2, "big") * 2
    elif kind == "BMP":
        data[18:26] = side.to_bytes(4, "little") * 2
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "side"), [("PNG", 13_300), ("PNG", 60_000), ("GIF", 65_000), ("JPEG", 65_000), ("BMP", 13_300)]
)
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(
    kind: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: memory for the claimed size is taken before the size is looked at."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match=rf"{side}x{side} pixels would take \d+ MB, --max-decoded-mb allows 1024"):
        decode_image(bomb(kind, side), Transform(8))


def test_a_webp_bomb_is_refused_before_its_canvas_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(noise(0, 64), "WEBP", lossless=True)
    monkeypatch.setattr(Image, "open", lambda *words, **more: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"64x64 pixels would take 1 MB, --max-decoded-mb allows 0"):
        decode_image(data, Transform(8, max_bytes=48_000))


@pytest.mark.parametrize(
    ("kind", "pixel"),
    [*((kind, 12) for kind in ("PNG", "JPEG", "GIF", "TIFF", "AVIF", "BMP")), ("WEBP", 16), ("JPEG2000", 24)],
)
def test_the_bound_counts_the_copies_of_a_picture(kind: str, pixel: int) -> None:
    """Fault: a format that is not held to the bound, or a bound that refuses what fits."""
    data = encode(noise(0, 100, 50), kind)
    assert decode_image(data, Transform(8, max_bytes=pixel * 5000)).shape == (8, 8, 3)
    with pytest.raises(ValueError, match="50x100 pixels would take"):
        decode_image(data, Transform(8, max_bytes=pixel * 5000 - 1))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (shade, shade, shade)) for shade in (255, 0, 0)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    assert (decode_image(buffer.getvalue(), Transform(8)) == 255).all()


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of noise with these chunks behind its header."""
    plain = encode(noise(0))
    added = b"".join(struct.pack(">I", len(b)) + n + b + zlib.crc32(n + b).to_bytes(4, "big") for n, b in chunks)
    return plain[:33] + added + plain[33:]


LONG = b"x" * (2 << 20)
TEXTS = {
    "a compressed text": (b"zTXt", b"note\0\0" + zlib.compress(LONG)),
    "an international text": (b"iTXt", b"note\0\1\0en\0note\0" + zlib.compress(LONG)),
    "a plain one": (b"tEXt", b"note\0" + LONG),
    "a profile": (b"iCCP", b"sRGB\0\0" + zlib.compress(LONG)),
    "a damaged profile": (b"iCCP", b"sRGB\0\0garbage"),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
    "plain XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + LONG),
    "EXIF as text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LONG)),
    "EXIF that is none": (b"eXIf", b"garbage"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_picture_is_read_whatever_its_texts_hold(text: str) -> None:
    """Fault: a sound PNG of an editor that writes long texts or profiles does not decode."""
    assert np.array_equal(decode_image(png_with(TEXTS[text]), Transform(8)), noise(0))


def test_an_orientation_in_a_text_still_turns() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="3"/></x:xmpmeta>'
    turned = png_with((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp), TEXTS["a compressed text"])
    assert np.array_equal(decode_image(turned, Transform(8)), noise(0)[::-1, ::-1])


def test_why_a_file_is_no_picture_names_no_address() -> None:
    """Fault: `<_io.BytesIO object at 0x7f…>`, other each time."""
    for data, words in (
        (b"", "empty"),
        (b"hello", "no picture of a known format"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no picture of a known format"),  # would run Ghostscript
    ):
        with pytest.raises(ValueError, match=words):
            decode_image(data, Transform(8))
