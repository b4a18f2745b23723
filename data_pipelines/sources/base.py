"""The base of all sources: ordered lists of images that are read and decoded on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.sources.transform import Transform, decode_image
from warm_dist.errors import reason
from warm_dist.rng import generator

MAX_FILE_BYTES = 256 << 20  # larger image files are a mistake or an attack


@dataclass(frozen=True)
class Sample:
    """One decoded image. label: class number, -1 without classes. image: (H, W, C) uint8."""

    key: str
    label: int
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class BadImage:
    """An image that does not decode, and the reason."""

    key: str
    reason: str


Item = Sample | BadImage


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order; iterable any number of times.

    part: (start, stop) → these samples, picklable for packing in several processes. identity: text that changes with the
    content. shuffled: returns the samples in a fixed random order; None where random access would be slow. told: what was
    taken for images, classes and split, and what was left out, in printable lines.
    """

    length: int
    class_names: tuple[str, ...]
    attribution: str
    part: Callable[[int, int], Iterable[Item]]
    identity: str = ""
    shuffled: Callable[[], Source] | None = None
    told: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Item]:
        return iter(self.part(0, self.length))


class Record(NamedTuple):
    """An image not yet read. place: its location, for the source's reader."""

    key: str
    label: int
    place: Any


@dataclass(frozen=True)
class Pictures:
    """A part of a listed source. read: a record's place → the file's bytes, or the final image (H, W, C) uint8."""

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
                yield BadImage(record.key, reason(error))


def listed(
    records: Sequence[Record],
    read: Callable[[Any], bytes | NDArray[np.uint8]],
    transform: Transform,
    class_names: Sequence[str] = (),
    attribution: str = "",
    identity: Iterable[object] = (),
    told: tuple[str, ...] = (),
) -> Source:
    """A source of images that can be read in any order. identity: a value per record that changes with its content."""
    digest = hashlib.sha256(repr((transform, tuple(class_names))).encode())
    for record, content in zip(records, identity, strict=True):
        digest.update(f"{record.key}\0{record.label}\0{content}\n".encode("utf-8", "surrogatepass"))

    def ordered(order: Sequence[int] | range, text: str) -> Source:
        def part(start: int, stop: int) -> Pictures:
            return Pictures([records[row] for row in order[start:stop]], read, transform)

        return Source(len(order), tuple(class_names), attribution, part, text, told=told)

    def shuffled() -> Source:
        bits = generator(0, "pack", 0).bit_generator.random_raw(len(records))
        order: list[int] = np.argsort(bits, kind="stable").tolist()
        return ordered(order, digest.hexdigest() + " shuffled")

    return replace(ordered(range(len(records)), digest.hexdigest()), shuffled=shuffled)


def check_size(size: int) -> None:
    """Raises ValueError for a file larger than MAX_FILE_BYTES."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes, at most {MAX_FILE_BYTES} are allowed")


def finished(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The reader of sources that hold final images."""
    return image
