"""The real images' side of a Fréchet distance: measured once, kept beside the manifest, with the floor."""

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
    """moments: of all real images compared. rows: (K, D), features of K random ones, for KID, precision and recall.

    floor: the Fréchet distance between floor_n random real images and all the others: about what a perfect model would
    get (fid.floor_parts).
    """

    moments: Moments
    rows: Rows
    floor: float
    floor_n: int


@dataclass(frozen=True)
class ReferenceSpec:
    """All that decides a Reference. num_images: of the generated ones, which the floor's smaller part matches if it can."""

    extractor: str
    extractor_sha256: str
    resize: str
    fingerprint: str
    num_real: int
    num_images: int
    num_rows: int

    @property
    def path(self) -> str:
        """Of the file: reference/HASH.safetensors."""
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
    """Measure the reference on all ranks; whole on rank 0 alone. A collective.

    total: images of the data set, of which spec.num_real are taken at random. read: their rows → (n, C, H, W) uint8.
    after, and errors of one rank: see `each_batch`.
    """
    chosen = np.arange(total)
    if spec.num_real < total:
        chosen = np.sort(rng.generator(0, "reference").permutation(total)[: spec.num_real])
    parts = frechet.floor_parts(spec.num_real, spec.num_images, seed=0)
    kept = rng.generator(0, "reference rows").permutation(spec.num_real)[: spec.num_rows]
    masks = [_mask(spec.num_real, part) for part in (np.arange(spec.num_real), *parts)]
    stream = FeatureStream(world, extractor, masks, _mask(spec.num_real, kept))

    def work(numbers: range) -> None:
        stream.add(numbers, read(chosen[numbers.start : numbers.stop]))

    each_batch(world, spec.num_real, batch_size, work, after)
    (moments, *two), rows = stream.result()
    floor = frechet.frechet_distance(*two) if world.is_main else 0.0
    return Reference(moments, rows, floor, len(parts[0]))


def load(stores: Sequence[Store], spec: ReferenceSpec) -> Reference | None:
    """From the first store that has it whole."""
    from safetensors import SafetensorError

    for store in stores:
        try:
            return _parse(store.read(spec.path), spec)
        except (WarmDistError, SafetensorError, KeyError, ValueError):
            continue  # absent, out of reach, or damaged: measured anew
    return None


def keep(stores: Sequence[Store], spec: ReferenceSpec, reference: Reference) -> str | None:
    """Write it to the first store that takes it; returns where, or None."""
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {
        "moments": reference.moments.flat(),
        "rows": reference.rows,
        "floor": np.array([reference.floor, reference.floor_n], np.float64),
    }
    data = save(tensors | {"sha256": _digest(tensors)}, {"spec": json.dumps(vars(spec))})
    for store in stores:
        try:
            store.write(spec.path, data)
        except WarmDistError:
            continue  # a data set that may only be read, for instance
        return f"{store.url}/{spec.path}"
    return None


@contextlib.contextmanager
def turn(folder: Path | None, spec: ReferenceSpec, patience_s: float) -> Iterator[None]:
    """Wait for another run of this machine that measures the same, at most patience_s; the folder's lock is ours inside.

    Without it, or where the folder cannot be written, both measure: a waste, not a fault. kill -9 drops the lock too.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if folder is not None:
                path = (folder / spec.path).with_suffix(".lock")
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path, patience_s))
        yield


def _parse(data: bytes, spec: ReferenceSpec) -> Reference:
    """What `keep` wrote. Raises SafetensorError, KeyError or ValueError for anything else."""
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
    """(32,): the sha256 of names, types, shapes and bytes; safetensors itself notices no flipped bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _mask(size: int, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = np.zeros(size, bool)
    mask[chosen] = True
    return mask
