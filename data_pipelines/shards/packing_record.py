"""Records of finished shards, with which an interrupted packing continues, on any machine.

They are `parts/RECIPE/NNNNNN.SHARD.npz` below the data set's folder. RECIPE is a hash of the source and of every option
that the shards' bytes depend on, so records of another packing are never used.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from data_pipelines.shards.indexed import Indexed
from data_pipelines.shards.manifest import Shard
from data_pipelines.shards.names import BAD, LISTING, PARTS
from data_pipelines.shards.statistics import Statistics
from data_pipelines.sources.base import BadImage
from warm_dist.errors import DataError, printable, reason
from warm_dist.store.base import Store

EMPTY = "empty"  # instead of the shard's name if no image decodes
_READERS = 8
_PRINTED = 20  # images left out, on stderr
_ROWS = ("label", "offset", "length", "crc32")
_SUMS = ("total", "squares", "products")


class Part(NamedTuple):
    """A finished shard (None if no image decodes) and the images left out."""

    indexed: Indexed | None
    bad: Sequence[BadImage]


def path_of(recipe: str, number: int, shard: str) -> str:
    """The path of the number-th shard's record. shard: its file name, or EMPTY."""
    return f"{PARTS}/{recipe}/{number:06d}.{shard}.npz"


def shard_of(path: str) -> str:
    """The shard's name in a record's path."""
    return path.rpartition("/")[2].partition(".")[2].removesuffix(".npz")


def finished(store: Store, recipe: str) -> dict[int, str]:
    """Number → path of the existing records."""
    paths = [path for path in store.list(f"{PARTS}/{recipe}/") if path.endswith(".npz")]
    return {int(path.rpartition("/")[2].partition(".")[0]): path for path in paths}


def save(store: Store, recipe: str, number: int, part: Part) -> None:
    """Write the record of a stored shard."""
    arrays = {}
    head: dict[str, object] = {"bad": [asdict(item) for item in part.bad]}
    if part.indexed:
        found = part.indexed
        head |= {"shard": found.shard, "shape": found.shape, "payloads": found.payloads, "keys": found.keys}
        head["count"] = found.measure.count
        arrays = {name: getattr(found, name) for name in _ROWS} | {n: getattr(found.measure, n) for n in _SUMS}
    buffer = io.BytesIO()
    np.savez(buffer, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    store.write(path_of(recipe, number, part.indexed.shard.name if part.indexed else EMPTY), buffer.getvalue())


def save_listing(store: Store, told: Sequence[str]) -> None:
    """Keep what the source's listing told, for `load_listing`."""
    if told:
        store.write(LISTING, (json.dumps({"source": list(told)}, indent=1) + "\n").encode())
    else:
        store.delete(LISTING)


def load_listing(store: Store) -> list[str]:
    """What the source's listing told when the data set was packed; empty if that is not known."""
    try:
        told = json.loads(store.read(LISTING))["source"]
    except (DataError, ValueError, TypeError, KeyError):
        return []
    return [str(line) for line in told] if isinstance(told, list) else []


def report(store: Store, bad: Sequence[BadImage]) -> None:
    """Tell on stderr which images are left out, and list them all in bad_images.json."""
    for item in bad[:_PRINTED]:
        print(f"left out: {printable(item.key)}: {printable(item.reason)}", file=sys.stderr)
    if len(bad) > _PRINTED:
        print(f"left out: {len(bad) - _PRINTED} more, see {store.url}/{BAD}", file=sys.stderr)
    if bad:
        text = json.dumps([{"key": item.key, "reason": item.reason} for item in bad], indent=1)
        store.write(BAD, text.encode())
    else:
        store.delete(BAD)


def load_all(store: Store, paths: Sequence[str]) -> Iterator[Part]:
    """Read the records at these paths, in order, a few at a time. Raises DataError for a damaged record."""
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(paths), _READERS):
            yield from pool.map(lambda path: _load(store, path), paths[start : start + _READERS])


def _load(store: Store, path: str) -> Part:
    try:
        with np.load(io.BytesIO(store.read(path)), allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes())
            bad = [BadImage(**item) for item in head["bad"]]
            if "shard" not in head:
                return Part(None, bad)
            indexed = Indexed(
                Shard(*head["shard"]),
                tuple(head["shape"]),
                tuple(head["payloads"]),
                tuple(head["keys"]),
                measure=Statistics(head["count"], *(arrays[name] for name in _SUMS)),
                **{name: arrays[name] for name in _ROWS},
            )
            return Part(indexed, bad)
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{store.url}/{path}: is damaged ({reason(error)}); delete it and run the same command again"
        ) from None
