"""Statistics of the real images, with the Fréchet distance's floor: measured once and kept beside the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warm_dist import rng
from warm_dist.distributed.world import World
from warm_dist.errors import WarmDistError
from warm_dist.evaluation import frechet
from warm_dist.evaluation.feature_stream import Extractor, FeatureStream, Rows, each_batch
from warm_dist.evaluation.frechet import Moments
from warm_dist.files import locked
from warm_dist.store.base import Store

FORMAT = 2


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images compared with.

    moments: of all of them. rows: (K, D), features of K random ones, for KID, precision and recall. floor: the Fréchet
    distance between floor_n random ones and all the others, about that of a perfect model (`frechet.floor_parts`).
    """

    moments: Moments
    rows: Rows
    floor: float
    floor_n: int


@dataclass(frozen=True)
class ReferenceSpec:
    """Everything that determines a Reference. num_images: of generated images, the size of the floor's smaller part."""

    extractor: str
    extractor_sha256: str
    resize: str
    fingerprint: str
    num_real: int
    num_images: int
    num_rows: int

    @property
    def path(self) -> str:
        """The file's path in a store, reference/HASH.safetensors."""
        text = json.dumps([FORMAT, vars(self)], sort_keys=True)
        return f"reference/{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def measure(
    world: World,
    extractor: Extractor,
    spec: ReferenceSpec,
    total: int,
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8]],
    batch_size: int,
    after: Callable[[int], None],
) -> Reference:
    """Measure the reference on all ranks; complete only on rank 0. A collective.

    total: number of images in the data set, of which spec.num_real are drawn. read: rows → (n, C, H, W) uint8.
    after, and errors of one rank: see `each_batch`.
    """
    chosen = np.arange(total)
    if spec.num_real < total:
        chosen = np.sort(rng.generator(0, "reference").permutation(total)[: spec.num_real])
    parts = frechet.floor_parts(spec.num_real, spec.num_images, seed=0)
    kept = rng.generator(0, "reference rows").permutation(spec.num_real)[: spec.num_rows]
    numbers = np.arange(spec.num_real)
    *masks, rows_kept = [np.isin(numbers, part) for part in (numbers, *parts, kept)]
    stream = FeatureStream(world, extractor, masks, rows_kept)

    def work(batch: range) -> None:
        stream.add(batch, read(chosen[batch.start : batch.stop]))

    each_batch(world, spec.num_real, batch_size, work, after)
    (moments, *two), rows = stream.result()
    floor = frechet.frechet_distance(*two) if world.is_main else 0.0
    return Reference(moments, rows, floor, len(parts[0]))


def load(stores: Sequence[Store], spec: ReferenceSpec) -> Reference | None:
    """The reference from the first store that has it intact, or None."""
    from safetensors import SafetensorError

    for store in stores:
        with contextlib.suppress(WarmDistError, SafetensorError, KeyError, ValueError):  # absent, unreachable, damaged
            return _parse(store.read(spec.path), spec)
    return None


def keep(stores: Sequence[Store], spec: ReferenceSpec, reference: Reference) -> str | None:
    """Write the reference to the first store that accepts it; returns its URL, or None."""
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {
        "moments": reference.moments.flat(),
        "rows": reference.rows,
        "floor": np.array([reference.floor, reference.floor_n], np.float64),
    }
    data = save(tensors | {"sha256": _digest(tensors)}, {"spec": json.dumps(vars(spec))})
    for store in stores:
        with contextlib.suppress(WarmDistError):  # such as a read-only data set
            store.write(spec.path, data)
            return f"{store.url}/{spec.path}"
    return None


@contextlib.contextmanager
def turn(folder: Path | None, spec: ReferenceSpec, patience_s: float) -> Iterator[None]:
    """Hold a lock so that only one run of this machine measures a reference; waits at most `patience_s`, seconds.

    Without the lock (timeout, or a folder that cannot be written) both runs measure: a waste, not an error.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if folder is not None:
                path = (folder / spec.path).with_suffix(".lock")
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path, patience_s))
        yield


def _parse(data: bytes, spec: ReferenceSpec) -> Reference:
    """Parse what `keep` wrote. Raises SafetensorError, KeyError or ValueError for anything else."""
    from safetensors.numpy import load as parse

    tensors = parse(data)
    if not np.array_equal(tensors.pop("sha256"), _digest(tensors)):
        raise ValueError("another sha256")
    moments, rows = Moments.from_flat(tensors["moments"]), tensors["rows"]
    if (moments.n, rows.shape) != (spec.num_real, (spec.num_rows, len(moments.total))):
        raise ValueError(f"rows {rows.shape}, moments of {moments.n}")
    floor, floor_n = tensors["floor"].tolist()
    return Reference(moments, rows, floor, int(floor_n))


def _digest(tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """The sha256 of names, types, shapes and bytes, (32,); safetensors itself detects no flipped bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
