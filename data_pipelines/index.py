"""WebDataset shards → manifest: a walk over the tars, and the data's statistics. Also for shards that others wrote.

`python -m data_pipelines.index SHARDS_URL` gives existing shards (png, jpg, webp, npy members; cls labels) a manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.manifest import Manifest, Shard, write_manifest
from data_pipelines.payload import decode
from data_pipelines.store import Store, open_store
from warm_dist.errors import DataError, run
from warm_dist.spectrum import dct
from warm_dist.types import LOW_MODES, DataInfo

IMAGES = ("npy", "png", "jpg", "jpeg", "webp")
OURS = re.compile(r"\d{6,}-[0-9a-f]{12}\.tar")  # the names that `Indexer.add` makes
_BATCH_BYTES = 16 << 20  # of float64 pixels, for the statistics


class Entry(NamedTuple):
    """One sample in a tar. offset, length: of the image's bytes. label: -1 without a cls member."""

    key: str
    label: int
    offset: int
    length: int
    crc32: int
    payload: str


class Measure:
    """Streaming sums, in float64, for the statistics of `DataInfo`."""

    def __init__(self) -> None:
        self.count = 0
        self.total: NDArray[np.float64] = np.zeros(())  # (C, H, W), of pixels in [-1, 1]
        self.squares: NDArray[np.float64] = np.zeros(())  # (C, H, W), of DCT coefficients
        self.products: NDArray[np.float64] = np.zeros(())  # (K, K), of the lowest coefficients

    def add(self, images: Sequence[NDArray[np.uint8]]) -> None:
        """images: (H, W, C) each, all of one shape."""
        step = max(1, _BATCH_BYTES // (8 * images[0].size))
        for start in range(0, len(images), step):
            x = np.stack(images[start : start + step]).transpose(0, 3, 1, 2) / 127.5 - 1
            self.count += len(x)
            self.total = self.total + x.sum(0)
            u = dct(torch.from_numpy(x)).numpy()
            self.squares = self.squares + (u**2).sum(0)
            low = u[..., :LOW_MODES, :LOW_MODES].reshape(len(u), -1)
            self.products = self.products + low.T @ low

    def info(self, num_classes: int) -> DataInfo:
        """Everything but the fingerprint, which the written manifest has."""
        channels, height, width = self.total.shape
        mean_image = self.total / self.count
        channel_mean = mean_image.mean((1, 2))
        # the mean of a channel enters one coefficient only, the DC: E[(u - sqrt(HW) m)^2] = E[u^2] - HW m^2
        power = self.squares / self.count
        power[:, 0, 0] = np.maximum(power[:, 0, 0] - height * width * channel_mean**2, 0)
        spectrum = power.mean(0)
        mean = dct(torch.from_numpy(mean_image)).numpy()[:, :LOW_MODES, :LOW_MODES]
        low_covariance = self.products / self.count - np.outer(mean, mean)
        low_mean = mean.copy()
        low_mean[:, 0, 0] = 0  # the channel mean is the DC, and nothing else
        return DataInfo(
            resolution=height,
            channels=channels,
            num_classes=num_classes,
            num_images=self.count,
            channel_mean=channel_mean,
            mean_image=mean_image,
            power_spectrum=spectrum,
            sigma_data=math.sqrt(spectrum.mean()),
            low_mean=low_mean.ravel(),
            low_covariance=low_covariance,
            fingerprint="",
        )


class Indexer:
    """Collects shards, one after another, and writes their manifest."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self.entries: list[Entry] = []
        self.measure = Measure()
        self._keys: set[str] = set()
        self._shape: tuple[int, ...] | None = None

    def add(self, file: Path, name: str = "") -> Shard:
        """Index one tar, decode all of it, and take it under `name` (empty: made from its sha256).

        Raises DataError if it is damaged, if images differ in shape from the first one, or keys repeat.
        """
        digest = _sha256(file)
        name = name or f"{len(self.shards):06d}-{digest[:12]}.tar"
        entries = walk(file, name)
        images = []
        with file.open("rb") as stream:
            for entry in entries:
                if entry.key in self._keys:
                    raise DataError(f"{name}: the key {entry.key!r} occurs twice")
                self._keys.add(entry.key)
                stream.seek(entry.offset)
                images.append(self._decode(stream.read(entry.length), f"image {entry.key!r} in shard {name}"))
                if len(images) * images[0].size >= _BATCH_BYTES:
                    self.measure.add(images)
                    images = []
        if images:
            self.measure.add(images)
        self.entries += entries
        self.shards.append(Shard(name, file.stat().st_size, len(entries), digest))
        return self.shards[-1]

    def _decode(self, payload: bytes, name: str) -> NDArray[np.uint8]:
        try:
            image = decode(payload, self._shape)
        except (ValueError, OSError) as error:
            raise DataError(f"{name}: does not decode ({error})") from None
        if image.shape[0] != image.shape[1]:
            raise DataError(f"{name}: has shape {image.shape}, images must be square; use data_pipelines.pack")
        self._shape = image.shape
        return image

    def write(self, store: Store, class_names: Sequence[str] = (), attribution: str = "") -> Manifest:
        """Write the manifest. class_names: empty means numbers, or no classes if there are no labels."""
        if not self.entries:
            raise DataError(f"{store.url}: no images")
        labels = np.array([entry.label for entry in self.entries], np.int64)
        if not class_names and labels.max() >= 0:
            class_names = [str(number) for number in range(labels.max() + 1)]
        payloads = {entry.payload for entry in self.entries}
        manifest = Manifest(
            info=self.measure.info(len(class_names)),
            shards=tuple(self.shards),
            shard=np.repeat(np.arange(len(self.shards), dtype=np.int32), [s.num_images for s in self.shards]),
            key=np.array([entry.key for entry in self.entries], object),
            label=labels,
            offset=np.array([entry.offset for entry in self.entries], np.int64),
            length=np.array([entry.length for entry in self.entries], np.int64),
            crc32=np.array([entry.crc32 for entry in self.entries], np.uint32),
            payload=payloads.pop() if len(payloads) == 1 else "mixed",
            class_names=tuple(class_names),
            attribution=attribution,
        )
        return write_manifest(store, manifest)


def walk(file: Path, name: str) -> list[Entry]:
    """The samples of a tar: members that share a name up to the first dot. Raises DataError for what is not whole."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if member.isreg() and stem and suffix:
                    samples.setdefault(folder + slash + stem, {})[suffix.lower()] = member
            # tarfile takes a tar that breaks off between two members for a whole one
            stream.seek(tar.offset)
            tail = stream.read()
            if len(tail) < tarfile.BLOCKSIZE or tail.strip(b"\0"):
                raise DataError(f"{name}: truncated, or garbage inside: no end of archive after {tar.offset} bytes")
            entries = [_entry(stream, key, members, name) for key, members in samples.items()]
            return sorted(entries, key=lambda entry: entry.offset)
    except tarfile.TarError as error:
        raise DataError(f"{name}: not a readable tar ({error})") from None


def _entry(stream: IO[bytes], key: str, members: dict[str, tarfile.TarInfo], name: str) -> Entry:
    def content(member: tarfile.TarInfo) -> bytes:
        stream.seek(member.offset_data)
        return stream.read(member.size)

    found = [suffix for suffix in IMAGES if suffix in members]
    if len(found) != 1:
        raise DataError(f"{name}: sample {key!r} needs one image ({', '.join(IMAGES)}), has members {sorted(members)}")
    label = -1
    if "cls" in members:
        text = content(members["cls"]).decode("ascii", "replace").strip()
        if not text.isdecimal():
            raise DataError(f"{name}: sample {key!r} has the label {text[:40]!r}, needs a class number")
        label = int(text)
    image = members[found[0]]
    return Entry(key, label, image.offset_data, image.size, zlib.crc32(content(image)), found[0])


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.index", description=__doc__)
    parser.add_argument("shards_url", help="s3://bucket/prefix or a folder with .tar files")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    args = parser.parse_args()
    from tqdm import tqdm

    store = open_store(args.shards_url, args.endpoint_url)
    names = [name for name in store.list() if name.endswith(".tar")]
    indexer = Indexer()
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.tar"
        for name in tqdm(names, desc="index", unit="shard", disable=None):
            store.download(name, local)
            indexer.add(local, name)
    manifest = indexer.write(store)
    print(f"{manifest.info.num_images} images in {len(names)} shards, fingerprint {manifest.info.fingerprint}")
    return 0


if __name__ == "__main__":
    run(main)
