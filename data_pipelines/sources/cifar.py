"""CIFAR's own archives as sources; their pickles are read without running anything in them."""

from __future__ import annotations

import codecs
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.sources.base import Record, Source, finished, listed
from data_pipelines.sources.transform import Transform, fit
from warm_dist.errors import DataError

_CIFAR_BYTES = 256 << 20  # of one file in CIFAR's archives; the largest has 155 MB
_CIFAR_IMAGE = 3 * 32 * 32


def open_cifar(path: Path, transform: Transform) -> Source:
    """CIFAR-10's or CIFAR-100's training images from the archive as its authors give it (python or binary version).

    Raises DataError for anything else: a compressed tar cannot be read in any order, and pickles are not trusted.
    """
    contents = _cifar_files(path)
    try:
        images, labels, names = _cifar_arrays(contents)
        if not len(images) or len(images) != len(labels) or not 0 <= min(labels) <= max(labels) < len(names):
            raise ValueError(f"{len(images)} images, {len(labels)} labels, {len(names)} class names")
    except Exception as error:  # a damaged pickle raises anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: not CIFAR-10's or CIFAR-100's archive ({reason}); unpack other compressed tars first"
        ) from None
    attribution = f"CIFAR-{len(names)} (Krizhevsky 2009), https://www.cs.toronto.edu/~kriz/cifar.html"
    records = [
        Record(f"train-{number:05d}", int(label), _resized(image, transform))
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    identity = [zlib.crc32(record.place.tobytes()) for record in records]
    return listed(records, finished, transform, names, attribution, identity)


def _resized(image: NDArray[np.uint8], transform: Transform) -> NDArray[np.uint8]:
    from PIL import Image

    return image if transform.resolution == len(image) else fit(Image.fromarray(image), transform)


def _cifar_files(path: Path) -> dict[str, bytes]:
    """The small files of a compressed tar, by their bare names."""

    def files() -> Iterator[tuple[str, bytes]]:
        with tarfile.open(path, "r|gz") as tar:
            for count, member in enumerate(tar):
                if member.size < 0 or count > 100:
                    raise tarfile.ReadError("more, or less, than CIFAR has")
                if member.isreg() and member.size <= _CIFAR_BYTES and (stream := tar.extractfile(member)):
                    yield member.name.rpartition("/")[2], stream.read()

    try:
        return dict(files())
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a readable compressed tar ({error})") from None


def _cifar_arrays(files: dict[str, bytes]) -> tuple[NDArray[np.uint8], list[int], tuple[str, ...]]:
    """(N, 32, 32, 3) images, labels (fine ones), class names."""
    if "batches.meta.txt" in files or "fine_label_names.txt" in files:
        ten = "batches.meta.txt" in files
        text = files["batches.meta.txt" if ten else "fine_label_names.txt"].decode("ascii")
        batches = [files[f"data_batch_{number}.bin"] for number in range(1, 6)] if ten else [files["train.bin"]]
        marks = 1 if ten else 2  # CIFAR-100 has the coarse class before the fine one
        rows = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, marks + _CIFAR_IMAGE)
        return _planes(rows[:, marks:]), rows[:, marks - 1].tolist(), tuple(text.split())
    ten = "batches.meta" in files
    meta = _unpickle(files["batches.meta" if ten else "meta"])
    parts = [_unpickle(files[f"data_batch_{n}"]) for n in range(1, 6)] if ten else [_unpickle(files["train"])]
    pixels = np.concatenate([_pixels(part[b"data"]) for part in parts])
    labels = [int(label) for part in parts for label in part[b"labels" if ten else b"fine_labels"]]
    return _planes(pixels), labels, tuple(n.decode() for n in meta[b"label_names" if ten else b"fine_label_names"])


def _planes(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _Pickled:
    """Stands for numpy's array and dtype: keeps what they would have been made from, and does nothing with it."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Knows nothing but lists, dicts, numbers, strings and the stand-in for numpy's arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name in ("ndarray", "dtype", "_reconstruct"):
                return _Pickled
        elif (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return codecs.encode
        raise pickle.UnpicklingError(f"{module}.{name} is refused")


def _unpickle(data: bytes) -> dict[Any, Any]:
    tree = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    if not isinstance(tree, dict):
        raise ValueError(f"{type(tree).__name__}, where a dict is needed")
    return {key.encode() if isinstance(key, str) else key: value for key, value in tree.items()}


def _pixels(array: _Pickled) -> NDArray[np.uint8]:
    _, shape, _, fortran, data = array.state
    if fortran or shape[1:] != (_CIFAR_IMAGE,):
        raise ValueError(f"an array of shape {shape}, where (N, {_CIFAR_IMAGE}) is needed")
    return np.frombuffer(data, np.uint8).reshape(shape)
