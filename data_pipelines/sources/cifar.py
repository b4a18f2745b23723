"""CIFAR's original archives as sources; their pickles are read without executing anything in them."""

from __future__ import annotations

import codecs
import gzip
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_pipelines.sources.base import Record, Source, finished, listed
from data_pipelines.sources.transform import Transform, fit
from warm_dist.errors import DataError, printable, reason

_CIFAR_BYTES = 256 << 20  # limit for all that the archive unpacks to; CIFAR's have up to 187 MB
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
        why = f"not a CIFAR-10 or CIFAR-100 archive ({reason(error)}); unpack other tars first"
        raise DataError(f"{printable(str(path))}: {why}") from None
    attribution = f"CIFAR-{len(names)} (Krizhevsky 2009), https://www.cs.toronto.edu/~kriz/cifar.html"
    records = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        resized = image if transform.resolution == len(image) else fit(Image.fromarray(image), transform)
        records.append(Record(f"train-{number:05d}", int(label), resized))
    identity = [zlib.crc32(record.place.tobytes()) for record in records]
    told = (f"images: CIFAR-{len(names)}'s {len(records)} training images", f"classes: {len(names)}, the archive's own")
    return listed(records, finished, transform, names, attribution, identity, told)


class _Bounded(io.RawIOBase):
    """A gzip's unpacked bytes, which end in an error at CIFAR's own size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = gzip.GzipFile(fileobj=file), _CIFAR_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError(f"not CIFAR's: unpacks to more than {_CIFAR_BYTES >> 20} MB")
        return len(data)


def _cifar_files(path: Path) -> dict[str, bytes]:
    """File name → content of the files in a compressed tar."""
    files = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_Bounded(file), mode="r|") as tar:
            for number, member in enumerate(tar):
                if member.size < 0 or number > 100:
                    raise tarfile.ReadError("not the files of CIFAR")
                if member.isreg() and (stream := tar.extractfile(member)):
                    files[member.name.rpartition("/")[2]] = stream.read()
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{printable(str(path))}: not a readable compressed tar ({reason(error)})") from None
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
