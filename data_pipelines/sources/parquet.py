"""Parquet files as sources: a column of encoded images and one of labels, as Hugging Face writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.sources.base import BadImage, Item, Sample, Source, check_size
from data_pipelines.sources.listing import File, Listing
from data_pipelines.sources.transform import LFS, LFS_REASON, Transform, decode_image
from warm_dist.errors import DataError, count, printable, reason

IMAGE, LABELS = "image", ("label", "labels", "fine_label")
_LABEL = re.compile(r"(.*_)?(labels?|class(es|_?id)?|categor(y|y_?id|ies)|targets?|y)", re.IGNORECASE)
_SPLIT = re.compile(r"(.*_)?(splits?|subset|partition|fold)", re.IGNORECASE)
_BATCH_ROWS = 64  # at most read from a row group at a time, so that groups of any size fit into memory
_LABEL_ROWS = 1 << 16
_BOMB_RATIO = 100  # encoded pictures hardly shrink
_SHARE = 4  # of the allowed bytes, for a batch of encoded images


class _Columns(NamedTuple):
    """The columns' names. label: None without classes."""

    image: str
    label: str | None


class _Slice(NamedTuple):
    """Rows [start, stop) of a row group. first: the group's first row in its file. stem: of its rows' keys. batch: rows."""

    path: str
    stem: str
    group: int
    first: int
    start: int
    stop: int
    batch: int


@dataclass(frozen=True)
class _Rows:
    """A part of a Parquet source."""

    slices: Sequence[_Slice]
    columns: _Columns
    num_classes: int
    transform: Transform

    def __iter__(self) -> Iterator[Item]:
        for piece in self.slices:
            for row, data, label in _cells(piece, self.columns):
                key, missing = f"{piece.stem}-{piece.first + row:08d}", label is None
                label = -1 if label is None else int(label)
                if self.num_classes and missing:
                    yield BadImage(key, "its label is null")
                    continue
                if self.num_classes and not 0 <= label < self.num_classes:
                    yield BadImage(key, f"label {label} is not one of the {self.num_classes} classes")
                    continue
                try:
                    check_size(len(data or b""))
                    item: Item = Sample(key, label, decode_image(data or b"", self.transform))
                except (ValueError, MemoryError) as error:
                    item = BadImage(key, reason(error))
                yield item


def open_tables(root: Path, files: Sequence[File], listing: Listing, transform: Transform) -> Source:
    """The rows of the files below `root` in order.

    Raises DataError for a schema without images or with non-integer labels, and for a row group that unpacks to too much;
    ConfigError where two readings are plausible.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [split.file for split in listing.of_split(files, shards=True)]
    listing.complete(files)
    folders = sorted({file.name.rpartition("/")[0] for file in files})
    if len(folders) > 1 and not listing.choice.include:
        pattern = f"{escape(folders[0])}/*" if folders[0] else "*"
        raise listing.refuse(
            f"tables in several folders, {folders[0]!r} and {folders[1]!r}; choose by --include {pattern!r}"
        )
    groups: list[_Slice] = []
    described = []
    columns, kinds = _Columns("", None), None
    schema = None
    for name in (file.name for file in files):
        path = root / name
        where = printable(str(path))
        try:
            with pq.ParquetFile(path) as file:
                metadata, schema = file.metadata, schema or file.schema_arrow
                columns = columns if groups or kinds else _find_columns(listing, where, schema)
                found = [file.schema_arrow.field(column).type for column in columns if column]
            kinds = kinds or found
            if found != kinds:
                raise DataError(f"{where}: its columns {columns} have the types {found}, the first file's {kinds}")
            first = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                batch = _batch_rows(where, metadata.row_group(group), columns, transform.max_bytes)
                groups.append(_Slice(str(path), _stem(name, folders), group, first, 0, rows, batch))
                first += rows
        except KeyError as error:
            lost = [name for name in columns if name and re.search(rf"\b{re.escape(name)}\b", str(error))]
            raise DataError(
                f"{where}: lacks a column of {printable(files[0].name)}, {' or '.join(map(repr, lost or filter(None, columns)))}"
            ) from None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{where}: not readable as Parquet ({_reason(path, error)})") from None
        described.append((name, path.stat().st_size, first))
    names = _class_names([root / file.name for file in files], schema, columns.label)
    total = sum(group.stop for group in groups)
    listing.notes.insert(0, f"images: {count(total, 'row')} of {count(len(files), 'table')}, column {columns.image!r}")
    listing.note(f"classes: {len(names) or 'none'}" + (f", column {columns.label!r}" if columns.label else ""))

    def part(start: int, stop: int) -> _Rows:
        slices, begin = [], 0
        for group in groups:
            low, high = max(start - begin, 0), min(stop - begin, group.stop)
            if low < high:
                slices.append(group._replace(start=low, stop=high))
            begin += group.stop
        return _Rows(slices, columns, len(names), transform)

    identity = repr((described, columns, names, transform))
    return Source(total, names, listing.where, part, identity, told=listing.told())


def _stem(name: str, folders: Sequence[str]) -> str:
    """What the keys of a table's rows begin with, different for each table."""
    return Path(name).stem if len(folders) == 1 else name.rpartition(".")[0]


def _batch_rows(where: str, group: Any, columns: _Columns, max_bytes: int) -> int:
    """Rows of a group to read at once: no value is longer than its column when unpacked, however often it is repeated."""
    share, unpacked, packed = max_bytes // _SHARE, int(group.total_byte_size), 0
    if not 0 < unpacked <= share:  # else pyarrow is not asked for columns: where their record is damaged, it aborts
        chunks = [group.column(number) for number in range(group.num_columns)]
        ours = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
        unpacked = max((chunk.total_uncompressed_size for chunk in ours), default=0)
        packed = max((chunk.total_compressed_size for chunk in ours), default=0)
    if unpacked > share and unpacked > _BOMB_RATIO * packed:
        limit = f"at most {share >> 20} MB, a quarter of --max-decoded-mb, are allowed"
        raise DataError(f"{where}: {packed} bytes of a column unpack to {unpacked}; {limit}")
    return max(1, min(_BATCH_ROWS, share // max(1, unpacked)))


def _cells(piece: _Slice, columns: _Columns) -> Iterator[tuple[int, bytes | None, int | None]]:
    """(row within the group, encoded image, label) of each row in a slice."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(piece.path) as file:
            row = 0
            for batch in file.iter_batches(piece.batch, [piece.group], [name for name in columns if name]):
                low, high = max(piece.start - row, 0), min(piece.stop - row, len(batch))
                if low < high:
                    cut = batch.slice(low, high - low)
                    labels = cut.column(columns.label).to_pylist() if columns.label else [None] * len(cut)
                    for number, (cell, label) in enumerate(zip(cut.column(columns.image), labels, strict=True)):
                        value = cell.as_py()
                        data = value.get("bytes") if isinstance(value, dict) else value
                        yield row + low + number, data, label
                row += len(batch)
                if row >= piece.stop:
                    return
    except (pa.ArrowException, OSError, ValueError) as error:
        where = f"{printable(piece.path)}: row group {piece.group}"
        raise DataError(f"{where} cannot be read ({reason(error)})") from None


def _reason(path: Path, error: Exception) -> str:
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            return LFS_REASON
    return reason(error)


def _find_columns(listing: Listing, where: str, schema: Any) -> _Columns:
    import pyarrow as pa

    choice = listing.choice
    images = [field.name for field in schema if _holds_images(field.type) and field.name not in choice.exclude]
    if not images:
        raise DataError(f"{where}: no column of images (binary, or a struct with binary 'bytes'); has {schema.names}")
    image = IMAGE if IMAGE in images else images[0]
    if len(images) > 1 and image != IMAGE:
        raise listing.refuse(f"several columns of images, {images}; leave out all but one, by --exclude NAME")
    labels = [name for name in LABELS if name in schema.names and name not in choice.exclude]
    for field in schema:
        if _SPLIT.fullmatch(field.name) and field.name not in choice.exclude and choice.split != "none":
            ways = f"write each split to a table of its own, or take all rows by --exclude {field.name}"
            raise listing.refuse(f"the column {field.name!r} speaks of splits; {ways}")
    if choice.classes not in (None, "none"):
        if choice.classes not in schema.names:
            raise listing.refuse(f"--classes {choice.classes}: no such column; has {schema.names}")
        labels = [choice.classes]
    elif choice.classes is None and len(labels) != 1:
        plausible = labels or [
            field.name
            for field in schema
            if pa.types.is_integer(field.type) and _LABEL.fullmatch(field.name) and field.name not in choice.exclude
        ]
        if plausible:
            ways = " or ".join(f"--classes {name}" for name in [*plausible, "none"])
            raise listing.refuse(f"{' or '.join(map(repr, plausible))} may be labels; choose by {ways}")
    label = None if choice.classes == "none" or not labels else labels[0]
    if label and not pa.types.is_integer(schema.field(label).type):
        kind = schema.field(label).type
        raise DataError(f"{where}: column {label!r} is {kind}, class labels must be integers; or say --classes none")
    for name in schema.names:
        if name not in (image, label):
            listing.leave("columns", name)
    return _Columns(image, label)


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_images(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(paths: list[Path], schema: Any, label: str | None) -> tuple[str, ...]:
    """Class names from Hugging Face's metadata, else numbers up to the largest label."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if label is None:
        return ()
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        pass  # not written by Hugging Face's datasets
    largest = -1
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_LABEL_ROWS, columns=[label]):  # whole columns may not fit into memory
                    found = pc.max(batch.column(0)).as_py()
                    largest = max(largest, -1 if found is None else int(found))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{printable(str(path))}: column {label!r} cannot be read ({reason(error)})") from None
    if largest >= 1 << 20:
        raise DataError(
            f"{printable(str(paths[0]))}: column {label!r} has the label {largest}, which is not a class number"
        )
    return tuple(str(number) for number in range(largest + 1))
