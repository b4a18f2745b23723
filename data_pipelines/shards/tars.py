"""Locates regular files and WebDataset samples inside a tar without extracting it."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from data_pipelines.sources.pictures import is_hidden
from warm_dist.errors import DataError, printable, reason

IMAGES = ("npy", "png", "jpg", "jpeg", "webp")  # suffixes of a sample's image
_PIECE_BYTES = 1 << 20
MAX_LABEL = 1 << 20  # larger class numbers count as damage


class Member(NamedTuple):
    """A regular file in a tar. offset, size: of its bytes."""

    name: str
    offset: int
    size: int


class Entry(NamedTuple):
    """One sample in a tar. offset, length: of the image's bytes. label: -1 without a cls member."""

    key: str
    label: int
    offset: int
    length: int
    crc32: int
    payload: str


def members(file: Path, name: str, skipped: Callable[[str], object] = lambda name: None) -> Iterator[Member]:
    """The regular files of an uncompressed tar; folders are passed over, `skipped` is told of links, devices and sparse files.

    Names serve only as keys, so `../x` is harmless. name: of the tar in errors. Raises DataError for a file that is not a
    tar, is truncated, or has garbage inside.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            reached = -1
            while (member := tar.next()) is not None:
                # a negative size would send tarfile backwards forever (CVE-2025-8194)
                if tar.offset <= reached or member.size < 0 or member.offset_data + member.size > size:
                    claim = f"{member.name[:80]!r} claims {member.size} bytes that are not there"
                    raise DataError(f"{name}: truncated, or a false size: {claim}")
                reached = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep a kilobyte per file
                if member.isreg() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size)
                elif not member.isdir():
                    skipped(member.name)
            # tarfile accepts a tar that is truncated between two members
            stream.seek(tar.offset)
            if not _only_zeros(stream):
                raise DataError(f"{name}: truncated, or garbage inside: no end of archive after {tar.offset} bytes")
    except (tarfile.TarError, ValueError, OverflowError, EOFError, MemoryError, RecursionError) as error:
        raise DataError(f"{name}: not a readable tar ({reason(error)})") from None


def samples(file: Path, name: str) -> list[Entry]:
    """The WebDataset samples of a tar by offset; members with the same name up to the first dot form a sample.

    Raises DataError as `members` does, and for a sample without exactly one image, with an invalid label, or with a
    member that occurs twice.
    """
    found: dict[str, dict[str, Member]] = {}
    for member in members(file, name):
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if stem and suffix and not is_hidden(member.name):
            sample = found.setdefault(printable(folder + slash + stem), {})  # bytes that are not UTF-8 cannot be stored
            if sample.setdefault(suffix.lower(), member) is not member:
                raise DataError(f"{name}: the member {member.name[:80]!r} occurs twice")
    with file.open("rb") as stream:
        return sorted((_entry(stream, key, sample, name) for key, sample in found.items()), key=lambda e: e.offset)


def read_label(text: bytes, name: str) -> int:
    """The class number in a cls member. name: of the sample in errors. Raises DataError if it is not a class number."""
    number = text.strip()
    if not (number.isdigit() and len(number) < 8 and int(number) < MAX_LABEL):
        raise DataError(f"{name} has the label {text[:40].decode('ascii', 'replace').strip()!r}, needs a class number")
    return int(number)


def _entry(stream: IO[bytes], key: str, sample: dict[str, Member], name: str) -> Entry:
    def content(member: Member) -> bytes:
        stream.seek(member.offset)
        return stream.read(member.size)

    images = [suffix for suffix in IMAGES if suffix in sample]
    if len(images) != 1:
        raise DataError(f"{name}: sample {key!r} needs one image ({', '.join(IMAGES)}), has members {sorted(sample)}")
    label = read_label(content(sample["cls"]), f"{name}: sample {key!r}") if "cls" in sample else -1
    image = sample[images[0]]
    return Entry(key, label, image.offset, image.size, zlib.crc32(content(image)), images[0])


def _only_zeros(stream: IO[bytes]) -> bool:
    """Whether at least one block, and only zeros, remain until the end."""
    total = 0
    while piece := stream.read(_PIECE_BYTES):
        if piece.strip(b"\0"):
            return False
        total += len(piece)
    return total >= tarfile.BLOCKSIZE
