"""Parquet files as sources: a column of encoded images and one of labels, as Hugging Face writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.sources.base import BadImage, Item, Sample, Source
from data_pipelines.sources.transform import Transform, decode_image
from warm_dist.errors import DataError

LABELS = ("label", "labels", "fine_label")
_BATCH_ROWS = 64  # read from a row group at a time, so that groups of any size fit into memory


class _Columns(NamedTuple):
    """The columns' names. label: None without classes."""

    image: str
    label: str | None


class _Slice(NamedTuple):
    """Rows [start, stop) of a row group. first: the group's first row in its file."""

    path: str
    group: int
    first: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Rows:
    """A part of a Parquet source."""

    slices: Sequence[_Slice]
    columns: _Columns
    num_classes: int
    transform: Transform

    def __iter__(self) -> Iterator[Item]:
        for piece in self.slices:
            stem = Path(piece.path).stem
            for row, data, label in _cells(piece, self.columns):
                key, label = f"{stem}-{piece.first + row:08d}", -1 if label is None else int(label)
                if self.num_classes and not 0 <= label < self.num_classes:
                    yield BadImage(key, f"label {label} is not one of the {self.num_classes} classes")
                    continue
                try:
                    item: Item = Sample(key, label, decode_image(data or b"", self.transform))
                except ValueError as error:
                    item = BadImage(key, str(error))
                yield item


def open_tables(paths: list[Path], transform: Transform) -> Source:
    """The rows of all files in order. Raises DataError for a schema without images or with non-integer labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups: list[_Slice] = []
    described = []
    columns, kinds = _Columns("", None), None
    schema = None
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            schema = schema or file.schema_arrow
            columns = columns if groups or kinds else _find_columns(path, schema)
            found = [file.schema_arrow.field(name).type for name in columns if name]
            kinds = kinds or found
            if found != kinds:
                raise DataError(f"{path}: its columns {columns} have the types {found}, the first file's {kinds}")
        except KeyError as error:
            raise DataError(f"{path}: lacks the column {error} of {paths[0].name}") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path}: not readable as Parquet ({error})") from None
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            groups.append(_Slice(str(path), group, first, 0, rows))
            first += rows
        described.append((path.name, path.stat().st_size, first))
    names = _class_names(paths, schema, columns.label)

    def part(start: int, stop: int) -> _Rows:
        slices, begin = [], 0
        for group in groups:
            low, high = max(start - begin, 0), min(stop - begin, group.stop)
            if low < high:
                slices.append(group._replace(start=low, stop=high))
            begin += group.stop
        return _Rows(slices, columns, len(names), transform)

    identity = repr((described, columns, names, transform))
    return Source(sum(group.stop for group in groups), names, str(paths[0]), part, identity)


def _cells(piece: _Slice, columns: _Columns) -> Iterator[tuple[int, bytes | None, int | None]]:
    """(row within the group, encoded image, label) of each row in a slice."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(piece.path) as file:
            row = 0
            for batch in file.iter_batches(_BATCH_ROWS, [piece.group], [name for name in columns if name]):
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
        raise DataError(f"{piece.path}: row group {piece.group} cannot be read ({error})") from None


def _find_columns(path: Path, schema: Any) -> _Columns:
    import pyarrow as pa

    image = next((field.name for field in schema if _holds_images(field.type)), None)
    if image is None:
        raise DataError(f"{path}: no column of images (binary, or a struct with binary 'bytes'); has {schema.names}")
    label = next((name for name in LABELS if name in schema.names), None)
    if label and not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{path}: column {label!r} is {schema.field(label).type}, class labels must be integers")
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
            column = pq.read_table(path, columns=[label])[label]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path}: column {label!r} cannot be read ({error})") from None
        found = pc.max(column).as_py()
        largest = max(largest, -1 if found is None else int(found))
    if largest >= 1 << 20:
        raise DataError(f"{paths[0]}: column {label!r} has the label {largest}, which is not a class number")
    return tuple(str(number) for number in range(largest + 1))
