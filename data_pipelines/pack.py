"""Images → WebDataset shards and their manifest, on S3 or in a folder.

`python -m data_pipelines.pack SOURCE OUT_URL --resolution 64`; SOURCE: openmoji, digits, a folder of images (class
folders become labels), a .zip of one, a .parquet file or a folder of those. The same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_pipelines.index import OURS, Indexer
from data_pipelines.manifest import NAME, Manifest, read_manifest
from data_pipelines.payload import PAYLOADS, encode
from data_pipelines.sources import BadImage, Sample, Source, open_source
from data_pipelines.store import Store, open_store
from warm_dist.errors import ConfigError, DataError, OutputError, WarmDistError, run

BAD = "bad_images.json"
RAW_UP_TO = 64  # pixels: raw arrays are hardly larger than PNGs there, and need no decoding
Progress = Callable[[Iterable[Any]], Iterable[Any]]


def pack(
    source: Source,
    out_url: str,
    endpoint_url: str | None = None,
    resolution: int | None = None,
    shard_size: int = 1024,
    payload: str | None = None,
    max_bad: float = 0.0,
    progress: Progress = iter,
) -> Manifest:
    """Write the source's images below `out_url`; the manifest comes last, so nothing half-written is ever readable.

    resolution: what the images must have (None: whatever they have). payload: one of PAYLOADS; None: npy up to 64 px.
    max_bad: largest fraction of undecodable images, which are left out and listed in bad_images.json and on stderr.
    progress: wraps the iteration over the source, e.g. tqdm. Shards are named by their content: a former data set
    in the same place stays whole until the new manifest replaces its own, and loses its other shards then.
    Raises DataError for too many bad images or none at all, ConfigError for a payload or shard size that cannot be.
    """
    if shard_size < 1 or payload not in (None, *PAYLOADS) or not 0 <= max_bad < 1:
        raise ConfigError(
            f"shard_size {shard_size}, payload {payload!r}, max_bad {max_bad}: need >= 1, one of {PAYLOADS}, [0, 1)"
        )
    store = open_store(out_url, endpoint_url)
    former = _former_shards(store, endpoint_url)
    bad: list[BadImage] = []
    indexer = Indexer()
    try:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "shard.tar"
            samples = _good(progress(source), bad)
            while chunk := list(islice(samples, 1)):
                _write_shard(local, chain(chunk, islice(samples, shard_size - 1)), resolution, payload)
                name = indexer.add(local).name
                store.upload(name, local)
        _report(bad, store)
        total = len(indexer.entries) + len(bad)
        if len(bad) > max_bad * total:
            raise DataError(
                f"{len(bad)} of {total} images do not decode, listed in {store.url}/{BAD}; "
                f"repair them, or leave out up to that fraction with --max-bad {len(bad) / total:.3g}"
            )
        if not indexer.entries:
            raise DataError("the source has no images")
        manifest = indexer.write(store, source.class_names, source.attribution)
    except BaseException:
        with suppress(WarmDistError):
            for shard in indexer.shards:
                if shard.name not in former:
                    store.delete(shard.name)
        raise
    for name in former - {shard.name for shard in manifest.shards}:
        store.delete(name)
    return manifest


def _former_shards(store: Store, endpoint_url: str | None) -> set[str]:
    """Shards that `pack` wrote here before; a manifest that cannot be read is as good as none."""
    try:
        shards = read_manifest(f"{store.url}/{NAME}", endpoint_url).shards
    except DataError:
        return set()
    return {shard.name for shard in shards if OURS.fullmatch(shard.name)}  # never delete what was only indexed


def _good(source: Iterable[Sample | BadImage], bad: list[BadImage]) -> Iterator[tuple[str, Sample]]:
    """Decoded samples with their names in the tar; the others are collected in `bad`."""
    for number, item in enumerate(source):
        if isinstance(item, BadImage):
            bad.append(item)
        else:
            # webdataset takes everything after the first dot for the kind of the member; ustar names end at 100 bytes
            readable = re.sub(r"[^A-Za-z0-9_-]+", "-", item.key)[-64:].strip("-")
            yield f"{number:08d}-{readable}", item


def _write_shard(
    local: Path, samples: Iterable[tuple[str, Sample]], resolution: int | None, payload: str | None
) -> None:
    from webdataset import TarWriter

    try:
        with local.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for key, sample in samples:
                height, width = sample.image.shape[:2]
                if resolution not in (None, height):
                    raise ConfigError(f"{sample.key}: is {height}x{width}, --resolution is {resolution}")
                kind = payload or ("npy" if height <= RAW_UP_TO else "png")
                members = {"__key__": key, kind: encode(sample.image, kind)}
                if sample.label >= 0:
                    members["cls"] = str(sample.label).encode("ascii")
                tar.write(members)
    except OSError as error:
        raise OutputError(f"{local.parent}: cannot be written ({error.strerror}); TMPDIR names another place") from None


def _report(bad: list[BadImage], store: Store) -> None:
    for item in bad:
        print(f"left out: {item.key}: {item.reason}", file=sys.stderr)
    if bad:
        text = json.dumps([{"key": item.key, "reason": item.reason} for item in bad], indent=1)
        store.write(BAD, text.encode())
    else:
        store.delete(BAD)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.pack", description=__doc__)
    parser.add_argument("source", help="openmoji, digits, a folder of images, a .zip, a .parquet file or folder")
    parser.add_argument("out_url", help="s3://bucket/prefix or a folder")
    parser.add_argument("--resolution", type=int, required=True, help="height = width, pixels")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    parser.add_argument("--shard-size", type=int, default=1024, help="images per shard (default: %(default)s)")
    parser.add_argument("--payload", choices=PAYLOADS, help=f"default: npy up to {RAW_UP_TO} pixels, else png")
    parser.add_argument("--max-bad", type=float, default=0.0, help="fraction that may be undecodable (default: 0)")
    args = parser.parse_args()
    if args.resolution < 1:
        raise ConfigError(f"--resolution {args.resolution}: must be at least 1")
    from tqdm import tqdm

    source = open_source(args.source, args.resolution)
    manifest = pack(
        source,
        args.out_url,
        args.endpoint_url,
        args.resolution,
        args.shard_size,
        args.payload,
        args.max_bad,
        lambda items: tqdm(items, desc="pack", total=len(source), unit="image", disable=None),
    )
    info = manifest.info
    print(
        f"{info.num_images} images {info.resolution}x{info.resolution}x{info.channels}, {info.num_classes} classes, "
        f"{len(manifest.shards)} shards at {args.out_url}\n"
        f"sigma_data {info.sigma_data:.4f}, channel means {', '.join(f'{mean:.4f}' for mean in info.channel_mean)}\n"
        f"fingerprint {info.fingerprint}"
    )
    return 0


if __name__ == "__main__":
    run(main)
