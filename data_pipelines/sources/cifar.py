"""CIFAR's original archives as sources; their pickles are read without executing anything in them."""

from __future__ import annotations

import codecs
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.sources.base import Record, Source, finished, listed
from data_pipelines.sources.transform import Transform, fit
from warm_dist.errors import DataError

_CIFAR_BYTES = 256 << 20  # limit for one file of the archive; CIFAR's largest has 155 MB
_CIFAR_IMAGE = 3 * 32 * 32


def open_cifar(path: Path, transform: Transform) -> Source:
    """The training images of CIFAR-10 or CIFAR-100, from the authors' python or binary archive.

    Raises DataError for any other archive, because a compressed tar cannot be read in any order.
    """
    from PIL import Image

    contents = _cifar_files(path)
    try:
        images, labels, names = _cifar_arrays(contents)
        if not len(images) or len(images) != len(labels) or not 0 <= min(labels) <= max(labels) < len(names):
            raise ValueError(f"{len(images)} images, {len(labels)} labels, {len(names)} class names")
    except Exception as error:  # a damaged pickle may raise any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a CIFAR-10 or CIFAR-100 archive ({reason}); unpack other tars first") from None
    attribution = f"CIFAR-{len(names)} (Krizhevsky 2009), https://www.cs.toronto.edu/~kriz/cifar.html"
    records = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        resized = image if transform.resolution == len(image) else fit(Image.fromarray(image), transform)
        records.append(Record(f"train-{number:05d}", int(label), resized))
    identity = [zlib.crc32(record.place.tobytes()) for record in records]
    return listed(records, finished, transform, names, attribution, identity)


def _cifar_files(path: Path) -> dict[str, bytes]:
    """File name → content of the files in a compressed tar."""
    files = {}
    try:
        with tarfile.open(path, "r|gz") as tar:
            for count, member in enumerate(tar):
                if member.size < 0 or count > 100:
                    raise tarfile.ReadError("not the files of CIFAR")
                if member.isreg() and member.size <= _CIFAR_BYTES and (stream := tar.extractfile(member)):
                    files[member.name.rpartition("/")[2]] = stream.read()
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a readable compressed tar ({error})") from None
    return files


def _cifar_arrays(files: dict[str, bytes]) -> tuple[NDArray[np.uint8], list[int], tuple[str, ...]]:
    """Images (N, 32, 32, 3), labels (CIFAR-100: the fine ones) and class names."""
    if "batches.meta.txt" in files or "fine_label_names.txt" in files:
        ten = "batches.meta.txt" in files
        text = files["batches.meta.txt" if ten else "fine_label_names.txt"].decode("ascii")
        batches = [files[f"data_batch_{number}.bin"] for number in range(1, 6)] if ten else [files["train.bin"]]
        marks = 1 if ten else 2  # CIFAR-100 stores the coarse class before the fine one
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
    """A stand-in for numpy's array and dtype that only stores their state."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Loads only lists, dicts, numbers, strings and the stand-in for numpy's arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name in ("ndarray", "dtype", "_reconstruct"):
                return _Pickled
        elif (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 pickles them for Python 2
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
