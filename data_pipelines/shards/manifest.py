"""The manifest: one Parquet row per sample and a JSON header. Its hash is the data's fingerprint."""

from __future__ import annotations

import hashlib
import io
import json
import math
from base64 import b64decode, b64encode
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from warm_dist.data import LOW_MODES, DataInfo
from warm_dist.errors import DataError, print_once
from warm_dist.store.base import Store, split_url
from warm_dist.store.open import open_store

NAME = "manifest.parquet"
VERSION = 3
UNCERTIFIED = 2  # an older version, without a digest
_HEADER = b"warm-dist"  # the key of the JSON header in the Parquet schema's metadata
_DIGEST = b"warm-dist.sha256"  # the key of the digest of header and rows beside it
_ARRAYS = ("mean_image", "power_spectrum", "low_mean", "low_covariance")
_TYPES = {"shard": "int32", "key": "string", "label": "int64", "offset": "int64", "length": "int64", "crc32": "uint32"}
_FEW_ROWS = 1 << 20  # up to this number rows fit into memory whatever the file claims


class Shard(NamedTuple):
    """One WebDataset tar; name is relative to the manifest's folder."""

    name: str
    size_bytes: int
    num_images: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A data set's samples. Columns are (N,), one row per sample, ordered by shard and offset.

    shard: index into `shards`. key: the sample's name. label: -1 without classes. offset, length: of the image's bytes
    inside the shard. crc32: of these bytes. payload: "npy", or the suffix of the encoded images.
    """

    info: DataInfo
    shards: tuple[Shard, ...]
    shard: NDArray[np.int32]
    key: NDArray[np.object_]
    label: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    payload: str
    class_names: tuple[str, ...]
    attribution: str

    def name(self, row: int) -> str:
        """A sample's name in errors."""
        return f"image {self.key[row]!r} in shard {self.shards[self.shard[row]].name}"


def read_manifest(url: str, endpoint_url: str | None = None) -> Manifest:
    """Read and check the manifest at `url` (…/manifest.parquet).

    Raises DataError if it is missing, damaged or inconsistent, and what the store raises.
    """
    folder, name = split_url(url)
    try:
        data = open_store(folder, endpoint_url).read(name)
    except DataError as error:
        if name == NAME:
            raise
        near = folder if name.endswith(".parquet") else url.rstrip("/")
        raise DataError(f"{error}; name the data set's manifest itself, {near}/{NAME}") from None
    try:
        manifest, certified = _parse(data)
    except _Damage as damage:
        raise DataError(f"{url}: {damage}") from None
    if not certified:
        print_once(
            f"{url}: has no digest, since an older version wrote it; damage may go unnoticed until it is packed anew",
            shared=True,
        )
    return manifest


def write_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Write manifest.parquet and return the manifest with its fingerprint. Raises DataError if it is inconsistent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _check(manifest)
    except _Damage as damage:
        raise DataError(f"{store.url}: the manifest would be invalid, it {damage}") from None
    columns = {name: pa.array(getattr(manifest, name)) for name in _TYPES}
    header = json.dumps(_header(manifest)).encode()
    metadata = {_HEADER: header, _DIGEST: _digest(header, manifest)}
    table = pa.table(columns).replace_schema_metadata(metadata)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    store.write(NAME, data)
    counts = _class_counts(manifest.label, manifest.info.num_classes)
    info = replace(manifest.info, fingerprint=hashlib.sha256(data).hexdigest(), class_counts=counts)
    return replace(manifest, info=info)


class _Damage(Exception):
    """What is wrong with a manifest; its text continues "the manifest …"."""


def _header(manifest: Manifest) -> dict[str, Any]:
    info = asdict(manifest.info)
    del info["fingerprint"], info["class_counts"]  # the hash of these very bytes; counted from the labels
    info["channel_mean"] = manifest.info.channel_mean.tolist()
    for name in _ARRAYS:
        info[name] = b64encode(getattr(manifest.info, name).astype("<f8").tobytes()).decode()
    return {
        "version": VERSION,
        "info": info,
        "shards": [shard._asdict() for shard in manifest.shards],
        "payload": manifest.payload,
        "class_names": manifest.class_names,
        "attribution": manifest.attribution,
    }


def _digest(header: bytes, manifest: Manifest) -> bytes:
    """The sha256 of header and rows, as 64 hex digits; Parquet itself detects no flipped bit."""
    digest = hashlib.sha256(header)
    for name in _TYPES:
        column = getattr(manifest, name)
        if name == "key":
            lengths = np.fromiter(map(len, column), np.int64, len(column))
            digest.update(lengths.tobytes() + "".join(column).encode("utf-8", "surrogatepass"))
        else:
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest().encode()


def _parse(data: bytes) -> tuple[Manifest, bool]:
    """The manifest, and whether it has a digest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        # rows have distinct keys and crc32s, so a file with fewer bytes than rows is false and would fill the memory
        if file.metadata.num_rows > max(_FEW_ROWS, len(data)):
            raise _Damage(f"claims {file.metadata.num_rows} rows in {len(data)} bytes")
        schema = file.schema_arrow
        header, told = ((schema.metadata or {}).get(key) for key in (_HEADER, _DIGEST))
        if header is None:
            raise _Damage("has no warm-dist header; make one with `python -m data_pipelines.index`")
        found = {name: str(schema.field(name).type) if name in schema.names else "missing" for name in _TYPES}
        if found != _TYPES:
            raise _Damage(f"has columns {found}, needs {_TYPES}")
        table = file.read(list(_TYPES))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _Damage(f"is not a readable Parquet file ({error}); name a manifest.parquet") from None
    if any(column.null_count for column in table.columns):
        raise _Damage("has empty cells")
    try:
        tree = json.loads(header)
        manifest = _from_header(tree, table, hashlib.sha256(data).hexdigest())
        if told != _digest(header, manifest) and (told is not None or tree["version"] != UNCERTIFIED):
            raise _Damage("differs from what was written (another sha256); copy it again, or pack the data again")
        _check(manifest)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError, RecursionError) as error:
        raise _Damage(f"has a damaged header or column ({type(error).__name__}: {error})") from None
    return manifest, told is not None


def _from_header(header: Any, table: Any, fingerprint: str) -> Manifest:
    if header["version"] not in (UNCERTIFIED, VERSION):
        raise _Damage(
            f"has version {header['version']}, this program reads {UNCERTIFIED} and {VERSION}; pack or index the data again"
        )
    fields = dict(header["info"])
    for name in ("resolution", "channels", "num_classes", "num_images"):
        fields[name] = int(fields[name])
    names = tuple(str(name) for name in header["class_names"])
    fields["sigma_data"] = float(fields["sigma_data"])
    size, channels = fields["resolution"], fields["channels"]
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"resolution {size}, channels {channels}")
    low = channels * min(LOW_MODES, size) ** 2
    shapes = ((channels, size, size), (size, size), (low,), (low, low))
    for name, shape in zip(_ARRAYS, shapes, strict=True):
        fields[name] = np.frombuffer(b64decode(fields[name]), "<f8").reshape(shape)
    # by the names: a number alone may ask for any memory
    fields["class_counts"] = _class_counts(table["label"].to_numpy(), len(names))
    fields["channel_mean"] = np.array(fields["channel_mean"], np.float64).reshape(channels)
    return Manifest(
        info=DataInfo(**fields, fingerprint=fingerprint),
        shards=tuple(
            Shard(str(shard["name"]), int(shard["size_bytes"]), int(shard["num_images"]), str(shard["sha256"]))
            for shard in header["shards"]
        ),
        **{name: table[name].to_numpy() for name in _TYPES},
        payload=str(header["payload"]),
        class_names=names,
        attribution=str(header["attribution"]),
    )


def _class_counts(label: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    known = label[(label >= 0) & (label < num_classes)]
    return np.bincount(known, minlength=num_classes).astype(np.float64)


def _check(manifest: Manifest) -> None:
    info, rows = manifest.info, len(manifest.key)
    if rows == 0 or info.num_images != rows:
        raise _Damage(f"has {rows} rows, its header counts {info.num_images} images")
    counts = [shard.num_images for shard in manifest.shards]
    counted = min(counts, default=-1) >= 0 and sum(counts) == rows
    if not counted or not np.array_equal(manifest.shard, np.repeat(np.arange(len(counts)), counts)):
        raise _Damage("does not list its rows shard by shard, as many as the header counts")
    names = [shard.name for shard in manifest.shards]
    outside_folder = [name for name in names if name.startswith("/") or ".." in name.split("/") or "\0" in name]
    if outside_folder or len(set(names)) < len(names):
        raise _Damage(f"names the shards {outside_folder[:1] or 'twice'}, which must be different files of its folder")
    sizes = np.array([shard.size_bytes for shard in manifest.shards], np.int64)[manifest.shard]
    # compared by subtraction: a sum may overflow
    outside = (manifest.offset < 0) | (manifest.length <= 0) | (manifest.length > sizes - manifest.offset)
    if outside.any():
        raise _Damage(f"places {manifest.name(int(outside.argmax()))} outside of it")
    overlapping = (np.diff(manifest.shard) == 0) & (manifest.offset[1:] < (manifest.offset + manifest.length)[:-1])
    if overlapping.any():
        raise _Damage(f"lets {manifest.name(int(overlapping.argmax()) + 1)} overlap the image before it")
    if len(manifest.class_names) != info.num_classes:
        raise _Damage(f"names {len(manifest.class_names)} classes, its header counts {info.num_classes}")
    lowest, highest = int(manifest.label.min()), int(manifest.label.max())
    if (lowest, highest) != (-1, -1) if info.num_classes == 0 else not 0 <= lowest <= highest < info.num_classes:
        raise _Damage(f"has labels from {lowest} to {highest}, its header counts {info.num_classes} classes")
    statistics = (info.channel_mean, np.array(info.sigma_data), *(getattr(info, name) for name in _ARRAYS))
    if not all(np.isfinite(statistic).all() for statistic in statistics):
        raise _Damage("has statistics that are not finite")
    power = float(info.power_spectrum.mean())
    if info.power_spectrum.min() < 0 or not math.isclose(info.sigma_data**2, power, rel_tol=1e-6, abs_tol=1e-12):
        raise _Damage(f"has sigma_data {info.sigma_data}, which is not the root of the power spectrum's mean")
