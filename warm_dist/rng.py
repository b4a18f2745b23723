"""All random numbers: counter-based generators keyed by (seed, purpose, index), derived and never saved.

An image gets the same numbers on every device, at every world size and batch size, before and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A Philox-4x64 generator: (seed, purpose) is the key, index the upper words of the counter.

    index: any integer >= 0 (an image's global position, an epoch, a sample's number). Streams of different indices
    never overlap: each has its own 2^64 blocks. Source: Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3"; the keying is ours.
    """
    return next(generators(seed, purpose, [index]))


def generators(seed: int, purpose: str, indices: Iterable[int]) -> Iterator[np.random.Generator]:
    """The `generator` of each index in turn: one object, set anew for each, so draw before the next is asked for."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    philox = np.random.Philox(key=np.frombuffer(digest, np.uint64))
    out = np.random.Generator(philox)
    state: Any = philox.state
    state["buffer"] = state["buffer"].tolist()  # setting it from lists takes 0.4 µs, from arrays 1.5, a new Philox 6
    state["state"]["key"] = state["state"]["key"].tolist()
    for index in map(int, indices):
        state["state"]["counter"] = [0, index & 0xFFFFFFFFFFFFFFFF, index >> 64, 0]
        philox.state = state
        yield out


def normals(seed: int, purpose: str, indices: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draw standard normals of the given shape for each index: (len(indices), *shape) float32."""
    out = np.empty((len(indices), *shape), np.float32)
    for row, draw in zip(out, generators(seed, purpose, indices), strict=True):
        draw.standard_normal(out=row, dtype=np.float32)
    return out


def uniforms(seed: int, purpose: str, indices: Sequence[int], count: int) -> NDArray[np.float64]:
    """Draw `count` uniforms in [0, 1) for each index: (len(indices), count) float64."""
    out = np.empty((len(indices), count))
    for row, draw in zip(out, generators(seed, purpose, indices), strict=True):
        draw.random(out=row)
    return out


def seed_torch(seed: int, nimg: int, rank: int) -> None:
    """Seed torch's generators (dropout) from (seed, nimg, rank), for bit-exact resumes at the same world size."""
    import torch  # here: packing and a trial's actor save 450 MB without it

    drawn = int(generator(seed, f"torch/{rank}", nimg).integers(2**63))
    torch.default_generator.manual_seed(drawn)  # torch.manual_seed takes 2 ms: it formats a traceback for devices
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(drawn)
