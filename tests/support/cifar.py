"""The members of CIFAR's archives, small, pickled as Python 2 did."""

from __future__ import annotations

import pickle
import pickletools

import numpy as np


def python2(tree: dict[str, object]) -> bytes:
    """As CIFAR's authors wrote it: protocol 2, numpy's old module, byte strings for keys and pixels."""
    data = pickletools.optimize(pickle.dumps({key.encode(): value for key, value in tree.items()}, protocol=2))
    return data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar(kind: str, count: int = 4) -> tuple[dict[str, bytes], np.ndarray, list[int], list[str]]:
    """The members of an archive, and what is in it: (N, 32, 32, 3) images, labels, names."""
    number = int(kind.partition("-")[0])
    batches = 5 if number == 10 else 1
    pixels = np.random.default_rng(0).integers(0, 256, (batches * count, 3072), np.uint8)
    labels = [(7 * n) % number for n in range(batches * count)]
    names = [f"class_{n}" for n in range(number)]
    members = {}
    for batch in range(batches):
        rows, marks = pixels[batch * count : (batch + 1) * count], labels[batch * count : (batch + 1) * count]
        name = f"data_batch_{batch + 1}" if number == 10 else "train"
        if kind.endswith("python"):
            key = "labels" if number == 10 else "fine_labels"
            members[f"cifar/{name}"] = python2({"data": rows, key: marks, "batch_label": b"one"})
        else:
            coarse = b"" if number == 10 else b"\7"
            members[f"cifar/{name}.bin"] = b"".join(
                coarse + bytes([mark]) + row.tobytes() for mark, row in zip(marks, rows, strict=True)
            )
    if kind.endswith("python"):
        key = "label_names" if number == 10 else "fine_label_names"
        members["cifar/batches.meta" if number == 10 else "cifar/meta"] = python2({key: [n.encode() for n in names]})
        members["cifar/test_batch" if number == 10 else "cifar/test"] = b"not read"
    else:
        text = "\n".join(names).encode() + b"\n\n"
        members["cifar/batches.meta.txt" if number == 10 else "cifar/fine_label_names.txt"] = text
    return members, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, names
