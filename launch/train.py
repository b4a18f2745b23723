"""Train: `deepspeed launch/train.py --config configs/imagenet64.json`, or under torchrun, or with plain python."""

from __future__ import annotations

import argparse
import os

from warm_dist import errors
from warm_dist.config.batch import check_world_size
from warm_dist.config.load import load_config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
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


def main() -> int:
    args = parse()
    config = load_config(args.config, args.set)
    size = args.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    if args.dry_run:
        from warm_dist.training.dry_run import dry_run

        print(dry_run(config, size))
        return errors.EXIT_OK
    check_world_size(config, size)
    from data_pipelines.reading.loader import open_loader
    from warm_dist.training.attempt import Attempt

    Attempt(config, open_loader).run()
    return errors.EXIT_OK


if __name__ == "__main__":
    errors.run(main, quiet=os.environ.get("RANK", "0") != "0")
