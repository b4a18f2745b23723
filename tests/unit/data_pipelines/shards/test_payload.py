"""A sample's bytes and its pixels: exact round trips, the pixels of PIL, and nothing but two errors from hostile bytes."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.shards.payload import MAX_PIXELS, PAYLOADS, decode, encode

SIZE = 24
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(channels: int, height: int = SIZE, width: int = SIZE) -> NDArray[np.uint8]:
    """Smooth with some noise, as photographs are."""
    y, x, c = np.mgrid[:height, :width, :channels]
    smooth = 127 + 60 * np.sin(x / 5 + c) + 50 * np.cos(y / 7)
    return (smooth + np.random.default_rng(0).normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    image: NDArray[np.uint8], rows: int | None = None, size: tuple[int, int] | None = None, extra: bytes = b""
) -> bytes:
    """An RGB PNG of our own making. rows: how many it holds. size: (width, height) that its header tells."""
    data = b"".join(b"\0" + row.tobytes() for row in image[:rows]) + extra
    header = struct.pack(">IIBBBBB", *(size or image.shape[1::-1]), 8, 2, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def npy(header: str, body: bytes = b"", version: int = 1) -> bytes:
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode("latin1") + body


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["npy", "png", "webp"])
def test_lossless_payloads_come_back_exactly(kind: str, channels: int) -> None:
    for height, width in ((SIZE, SIZE), (1, 1), (5, 300)):  # 300 x 5 x 3 B is more than one row of one PNG filter
        image = picture(channels, height, width)
        expected = np.repeat(image, 3 // channels, 2) if kind == "webp" else image  # WebP knows no grey
        out = decode(encode(image, kind))
        assert out.dtype == np.uint8
        assert np.array_equal(out, expected)
        assert np.array_equal(decode(memoryview(encode(image, kind)), expected.shape), expected)


def test_a_png_of_more_than_one_stored_block_comes_back_exactly() -> None:
    image = picture(3, 200, 200)  # 120,200 bytes of rows; a block holds 65,535
    assert np.array_equal(decode(encode(image, "png"), image.shape), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_comes_back_nearly(channels: int) -> None:
    """Fault: JPEGs are written at PIL's default quality, or with red and blue swapped."""
    image = picture(channels)
    error = decode(encode(image, "jpg"), image.shape).astype(int) - image
    # quality 95 rounds the 8x8 DCT of this noise to steps of 1 to 12, and colours twice more: measured 3.5 and 14
    assert np.sqrt((error**2).mean()) < 4
    assert abs(error).max() <= 20


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("bits", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (8, 2), (1, 3), (2, 3), (4, 3), (8, 3)])
def test_every_kind_of_png_has_the_pixels_that_pil_finds(bits: int, colour: int, interlaced: bool) -> None:
    generator = np.random.default_rng(bits + 10 * colour)
    for height, width in ((SIZE, SIZE), (9, 13), (1, 3), (3, 1), (1, 1)):
        sizes = [(height, width)]
        if interlaced:
            starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
            sizes = [(len(range(y, height, dy)), len(range(x, width, dx))) for y, x, dy, dx in starts]
        rows = b""
        for count, columns in sizes:
            row_bytes = (columns * bits * (3 if colour == 2 else 1) + 7) // 8
            for _ in range(count if columns else 0):
                rows += bytes([generator.integers(5)]) + generator.bytes(row_bytes)
        parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))]
        parts += (
            [chunk(b"tEXt", b"Author\0nobody"), chunk(b"PLTE", generator.bytes(3 * 2**bits))] if colour == 3 else []
        )
        stream = zlib.compress(rows)
        parts += [chunk(b"IDAT", stream[:7]), chunk(b"IDAT", stream[7:]), chunk(b"IEND", b"")]
        payload = SIGNATURE + b"".join(parts)
        expected = np.asarray(Image.open(io.BytesIO(payload)).convert("L" if colour == 0 else "RGB"))
        assert np.array_equal(decode(payload), expected.reshape(height, width, -1))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_kind_of_jpeg_has_the_pixels_that_pil_finds(mode: str) -> None:
    image = Image.fromarray(picture(3, 41, 53)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: not obeyed
    for options in (
        {"quality": 30, "subsampling": 2, "progressive": True},
        {"quality": 75, "subsampling": 1, "restart_marker_rows": 1},
        {"quality": 100, "subsampling": 0, "optimize": True, "comment": b"x" * 300, "exif": exif},
    ):
        payload = saved(image, "JPEG", **options)
        expected = np.asarray(Image.open(io.BytesIO(payload))).reshape(41, 53, -1)
        assert np.array_equal(decode(payload), expected)
        filled = payload[:2] + b"\xff\xff" + payload[2:]  # a marker may be preceded by any number of 0xFF
        assert np.array_equal(decode(filled), expected)


def test_lossy_webp_has_the_pixels_that_pil_finds() -> None:
    payload = saved(Image.fromarray(picture(3, 20, 30)), "WEBP", quality=80)
    assert np.array_equal(decode(payload, (20, 30, 3)), np.asarray(Image.open(io.BytesIO(payload))))


@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_truncated_payload_is_refused_wherever_it_ends(kind: str) -> None:
    payload = encode(picture(3), kind)
    # PNG's last chunk is a name and a crc, which PIL and we do not look at; all pixels are there
    for length in range(len(payload) - (4 if kind == "png" else 0)):
        for shape in (None, (SIZE, SIZE, 3)):
            with pytest.raises((ValueError, OSError)):
                decode(payload[:length], shape)


@pytest.mark.parametrize("kind", PAYLOADS)
def test_another_shape_is_refused(kind: str) -> None:
    payload = encode(picture(3), kind)
    for shape in ((SIZE, SIZE + 1, 3), (SIZE // 2, SIZE * 2, 3), (SIZE, SIZE, 1)):
        with pytest.raises(ValueError, match="needed"):
            decode(payload, shape)


def jpeg_of(height: int, width: int) -> bytes:
    payload = encode(picture(3), "jpg")
    return payload.replace(struct.pack(">BHH", 8, SIZE, SIZE), struct.pack(">BHH", 8, height, width))


def webp_of(height: int, width: int, kind: str) -> bytes:
    if kind == "VP8L":
        payload = encode(picture(3), "webp")
        return payload[:21] + struct.pack("<I", width - 1 | height - 1 << 14) + payload[25:]
    lossy = saved(Image.fromarray(picture(3)), "WEBP", quality=80)
    if kind == "VP8 ":
        return lossy[:26] + struct.pack("<HH", width, height) + lossy[30:]
    body = (
        b"VP8X" + struct.pack("<IBxxx", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body) + len(lossy) - 12) + b"WEBP" + body + lossy[12:]


BOMBS = {
    "png": png(picture(3), size=(16_000, 16_000)),
    "jpg": jpeg_of(16_000, 16_000),
    "webp lossless": webp_of(16_000, 16_000, "VP8L"),
    "webp lossy": webp_of(16_000, 16_000, "VP8 "),
    "webp extended": webp_of(16_000, 16_000, "VP8X"),
    "npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (16000, 16000, 3), }\n", bytes(99)),
    "png, a long stream": png(picture(3), extra=bytes(50_000_000)),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("shape", [(SIZE, SIZE, 3), None])
def test_a_header_that_lies_allocates_nothing(name: str, shape: tuple[int, int, int] | None, monkeypatch) -> None:
    def allocate(*size: object) -> None:
        raise AssertionError(f"PIL was asked for {size}")

    assert MAX_PIXELS < 16_000**2
    decode(encode(picture(3), "webp"), shape)  # the imports, which allocate too
    monkeypatch.setattr(Image.core, "new", allocate)
    monkeypatch.setattr(Image.core, "fill", allocate)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.__init__", allocate)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"needed|allowed"):
            decode(BOMBS[name], shape)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(BOMBS[name]) + 100_000
    finally:
        tracemalloc.stop()


def test_a_png_whose_stream_ends_early_is_not_half_filled() -> None:
    image = picture(3)
    assert np.array_equal(decode(png(image)), image)
    half = png(image, rows=SIZE // 2)
    assert not np.asarray(Image.open(io.BytesIO(half)))[SIZE // 2 :].any()  # PIL takes it, and leaves the rest black
    with pytest.raises(ValueError, match="876 bytes of pixels, where 1752 are needed"):  # 12, 24 rows of 1 + 72
        decode(half)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "neither npy nor PNG, JPEG or WebP"),
        (b"GIF89a" + bytes(99), "neither npy nor PNG, JPEG or WebP"),
        (saved(Image.fromarray(picture(3)), "GIF"), "neither npy nor PNG, JPEG or WebP"),
        (saved(Image.fromarray(picture(3)), "TIFF"), "neither npy nor PNG, JPEG or WebP"),
        (saved(Image.fromarray(picture(3)).convert("RGBA"), "PNG"), "8 bits and colour type 6"),
        (saved(Image.fromarray(picture(1)[..., 0].astype(np.uint16)), "PNG"), "16 bits and colour type 0"),
        (saved(Image.fromarray(picture(3)).convert("CMYK"), "JPEG"), "8 bits and 4 channels"),
        (saved(Image.fromarray(picture(3)).convert("RGBA").rotate(9), "WEBP"), "RGBA pixels"),
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2, 3), }\n", bytes(11)),
            "11 bytes of pixels, where 12",
        ),
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -2, 3), }\n", bytes(12)),
            "-2x-2 pixels, where 1 to",
        ),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2, 3), }\n", bytes(48)), "float32 array"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2, 3), }\n", b"cos\nsystem\n"), "object array"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (12,), }\n", bytes(12)), "uint8 array of shape"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (0, 2, 3), }\n"), "0x2 pixels, where 1 to"),
        (npy("(" * 900), "not a header"),
        (npy("[" * 100_000, version=2), "not a header"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2, 3), }\n", bytes(12), version=3), "not a header"),
    ],
)
def test_what_is_no_8_bit_picture_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        decode(payload)
    assert len(str(caught.value)) < 200


def test_arrays_that_other_programs_wrote_are_read() -> None:
    image = picture(3)
    for array in (image, np.asfortranarray(image), image[..., 0]):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, version=(2, 0))
        assert np.array_equal(decode(buffer.getvalue()), array.reshape(SIZE, SIZE, -1))


VALID = [encode(picture(channels), kind) for kind in PAYLOADS for channels in (1, 3)]
VALID += [webp_of(SIZE, SIZE, kind) for kind in ("VP8 ", "VP8X")]
VALID += [saved(Image.fromarray(picture(3)), "JPEG", progressive=True)]
VALID += [saved(Image.fromarray(picture(3)).quantize(16), "PNG")]
PLACE = st.floats(0, 1, exclude_max=True)  # as a share of the length; hypothesis likes small ones: the headers


@settings(max_examples=400, deadline=None)
@given(
    payload=st.sampled_from(VALID),
    changes=st.lists(st.tuples(PLACE, st.binary(min_size=1, max_size=4)), max_size=5),
    cut=st.one_of(st.just(1.0), PLACE),
    known=st.booleans(),
)
def test_mutated_payloads_are_refused_or_give_what_was_asked_for(
    payload: bytes, changes: list[tuple[float, bytes]], cut: float, known: bool
) -> None:
    data = bytearray(payload[: int(cut * len(payload))] if cut < 1 else payload)
    for place, value in changes:
        at = int(place * len(data))
        data[at : at + len(value)] = value
    shape = (SIZE, SIZE, 3) if known else None
    try:
        out = decode(bytes(data), shape)
    except (ValueError, OSError):
        return
    assert out.dtype == np.uint8
    assert out.ndim == 3
    assert out.shape == shape if known else out.shape[2] in (1, 3)
