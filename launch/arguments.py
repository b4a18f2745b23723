"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse


def parse_training(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=VALUE", help="override a key; may be repeated"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print config, batch arithmetic, parameters, memory; stop"
    )
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of processes to plan for")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    args = parser.parse_args()
    if args.world_size is not None and (not args.dry_run or args.world_size < 1):
        parser.error("--world-size takes a positive number, together with --dry-run")
    return args


def add_set(parser: argparse.ArgumentParser) -> None:
    """`--set sampler.key=V` for what has no flag of its own."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="sampler.key=VALUE",
        help="override any key of the sampler section, e.g. sampler.eta=0.5 or sampler.guidance=2; repeatable",
    )
