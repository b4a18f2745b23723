"""What the commands that sample share: which weights, and how to sample them."""

from __future__ import annotations

import argparse


def add_set(parser: argparse.ArgumentParser) -> None:
    """`--set sampler.key=V` for what has no flag of its own."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="sampler.key=VALUE",
        help="override any key of the sampler section, e.g. sampler.eta=0.5 or sampler.guidance=2; repeatable",
    )
