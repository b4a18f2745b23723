"""A source is a list of pictures that are read and decoded when they are due."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.sources.transform import Transform, decode_image
from warm_dist.rng import generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_FILE_BYTES = 256 << 20  # a picture file beyond it is a mistake or an attack


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


def finished(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The reader of sources that hold finished pictures."""
    return image
