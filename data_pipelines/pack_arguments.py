"""The command line of data_pipelines/pack.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from data_pipelines.shards.payload import PAYLOADS
from data_pipelines.sources.listing import SPLITS
from data_pipelines.sources.transform import MAX_BYTES, RESIZE
from warm_dist.cpus import usable_cpus
from warm_dist.paths import place_argument

RAW_UP_TO = 64
"""Pixels: up to this size raw arrays are hardly larger than PNGs and need no decoding."""
_MOST = 2**31 - 1


def _count(text: str) -> int:
    if not re.fullmatch(r"[+]?[0-9]{1,10}", text) or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: needs a whole number from 1 to {_MOST}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: needs a share, from 0 to less than 1")
    return share


def _word(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("needs a word, not an empty text; leave the flag out")
    return text


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: needs i/n with 1 <= i <= n, such as 2/8")
    return int(found[1]), int(found[2])


def parse(description: str | None = None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse pack's command line; None: this process's own."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data_pipelines.pack", description=description, formatter_class=raw)
    parser.add_argument("source", type=place_argument, help="see above")
    parser.add_argument("out_url", type=place_argument, help="s3://bucket/prefix or a folder")
    parser.add_argument("--resolution", type=int, required=True, help="height = width, pixels")
    parser.add_argument("--resize", choices=RESIZE, default="box", help="adm: ImageNet's center-crop (default: box)")
    parser.add_argument("--shuffle", action="store_true", help="pack in a fixed random order, if sorted by class")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    parser.add_argument("--shard-size", type=_count, default=1024, help="images per shard (default: %(default)s)")
    parser.add_argument("--payload", choices=PAYLOADS, help=f"default: npy up to {RAW_UP_TO} pixels, else png")
    parser.add_argument("--max-bad", type=_share, default=0.0, help="fraction that may be undecodable (default: 0)")
    parser.add_argument("--workers", type=_count, default=usable_cpus(), help="processes (default: one a CPU)")
    parser.add_argument(
        "--classes", type=_word, help="folders, none, dataset.json (EDM's), cls (WebDataset's) or a column of Parquet"
    )
    parser.add_argument(
        "--split", choices=(*SPLITS, "all", "none"), help="all: merged; none: no name is that of a split"
    )
    for name, text in (("include", "pack only names like these"), ("exclude", "leave out names like these")):
        parser.add_argument(
            f"--{name}", action="append", type=_word, default=[], metavar="PATTERN", help=f"{text}; * matches / too"
        )
    text = "that decoding one image may take, in each worker (default: %(default)s)"
    parser.add_argument("--max-decoded-mb", type=_count, default=MAX_BYTES >> 20, metavar="MB", help=text)
    text = "pack only the i-th of n parts; default: pack all missing shards and write the manifest"
    parser.add_argument("--part", type=_part, metavar="i/n", help=text)
    return parser.parse_args(arguments)
