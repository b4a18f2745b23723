"""The manifest: one Parquet row a sample and a JSON header. Its hash is the data's fingerprint."""

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

from data_pipelines.store import Store, open_store, split_url
from warm_dist.errors import DataError
from warm_dist.types import LOW_MODES, DataInfo

NAME = "manifest.parquet"
VERSION = 2
_HEADER = b"warm-dist"  # the key of the JSON header in the Parquet schema's metadata
_ARRAYS = ("mean_image", "power_spectrum", "low_mean", "low_covariance")
_COLUMNS = {
    "shard": np.int32,
    "key": object,
    "label": np.int64,
    "offset": np.int64,
    "length": np.int64,
    "crc32": np.uint32,
}


class Shard(NamedTuple):
    """One WebDataset tar; name is relative to the manifest's folder."""

    name: str
    size_bytes: int
    num_images: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What there is to read. Columns are (N,), one row a sample, in the order of the shards and of the samples in them.

    shard: index into `shards`. key: the sample's name. label: -1 without classes. offset, length: the image's bytes
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
        """How errors speak of a sample."""
        return f"image {self.key[row]!r} in shard {self.shards[self.shard[row]].name}"


def read_manifest(url: str, endpoint_url: str | None = None) -> Manifest:
    """Read and check the manifest at `url` (…/manifest.parquet). Raises DataError if it is none, damaged or inconsistent."""
    folder, name = split_url(url)
    data = open_store(folder, endpoint_url).read(name)
    try:
        manifest = _parse(data)
    except _Damage as damage:
        raise DataError(f"{url}: {damage}") from None
    return manifest


def write_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Write to the store's manifest.parquet; returns the manifest with its fingerprint. Raises DataError if inconsistent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _check(manifest)
    except _Damage as damage:
        raise DataError(f"{store.url}: the manifest would be wrong, {damage}") from None
    columns = {name: pa.array(getattr(manifest, name)) for name in _COLUMNS}
    table = pa.table(columns).replace_schema_metadata({_HEADER: json.dumps(_header(manifest))})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    store.write(NAME, data)
    return replace(manifest, info=replace(manifest.info, fingerprint=hashlib.sha256(data).hexdigest()))


class _Damage(Exception):
    pass


def _header(manifest: Manifest) -> dict[str, Any]:
    info = asdict(manifest.info)
    del info["fingerprint"]  # the hash of these very bytes
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


def _parse(data: bytes) -> Manifest:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise _Damage(f"is not a readable Parquet file ({error})") from None
    metadata = (table.schema.metadata or {}).get(_HEADER)
    if metadata is None:
        raise _Damage("has no warm-dist header; make one with `python -m data_pipelines.index`")
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise _Damage(f"lacks the columns {missing}")
    try:
        header = json.loads(metadata)
        if header["version"] != VERSION:
            raise _Damage(
                f"has version {header['version']}, this program reads {VERSION}; pack or index the data again"
            )
        fields = dict(header["info"])
        size, channels = int(fields["resolution"]), int(fields["channels"])
        low = channels * min(LOW_MODES, size) ** 2
        shapes = ((channels, size, size), (size, size), (low,), (low, low))
        for name, shape in zip(_ARRAYS, shapes, strict=True):
            fields[name] = np.frombuffer(b64decode(fields[name]), "<f8").reshape(shape)
        fields["channel_mean"] = np.array(fields["channel_mean"], np.float64).reshape(channels)
        manifest = Manifest(
            info=DataInfo(**fields, fingerprint=hashlib.sha256(data).hexdigest()),
            shards=tuple(Shard(**shard) for shard in header["shards"]),
            **{name: table[name].to_numpy().astype(dtype) for name, dtype in _COLUMNS.items()},
            payload=header["payload"],
            class_names=tuple(header["class_names"]),
            attribution=header["attribution"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _Damage(f"has a damaged header or column ({type(error).__name__}: {error})") from None
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    info, rows = manifest.info, len(manifest.key)
    if rows == 0 or info.num_images != rows:
        raise _Damage(f"has {rows} rows, its header counts {info.num_images} images")
    if not np.array_equal(
        manifest.shard, np.repeat(np.arange(len(manifest.shards)), [s.num_images for s in manifest.shards])
    ):
        raise _Damage("does not list its rows shard by shard, as many as the header counts")
    sizes = np.array([shard.size_bytes for shard in manifest.shards])[manifest.shard]
    outside = (manifest.offset < 0) | (manifest.length <= 0) | (manifest.offset + manifest.length > sizes)
    if outside.any():
        raise _Damage(f"places {manifest.name(int(outside.argmax()))} outside of it")
    overlapping = (np.diff(manifest.shard) == 0) & (manifest.offset[1:] < (manifest.offset + manifest.length)[:-1])
    if overlapping.any():
        raise _Damage(f"lets {manifest.name(int(overlapping.argmax()) + 1)} overlap the image before it")
    lowest, highest = int(manifest.label.min()), int(manifest.label.max())
    if (lowest, highest) != (-1, -1) if info.num_classes == 0 else not 0 <= lowest <= highest < info.num_classes:
        raise _Damage(f"has labels from {lowest} to {highest}, its header counts {info.num_classes} classes")
    statistics = (info.channel_mean, np.array(info.sigma_data), *(getattr(info, name) for name in _ARRAYS))
    if not all(np.isfinite(statistic).all() for statistic in statistics):
        raise _Damage("has statistics that are not finite")
    if info.power_spectrum.min() < 0 or not math.isclose(
        info.sigma_data**2, float(info.power_spectrum.mean()), rel_tol=1e-6, abs_tol=1e-12
    ):
        raise _Damage(f"has sigma_data {info.sigma_data}, which is not the root of the power spectrum's mean")
