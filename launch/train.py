"""Train a network: `deepspeed launch/train.py --config configs/imagenet64.json`, or with torchrun or plain python."""

from __future__ import annotations

from launch.arguments import parse_training
from warm_dist import errors, supervisor
from warm_dist.config.batch import check_world_size
from warm_dist.config.run import load_config
from warm_dist.distributed.environment import from_environment


def main() -> int:
    supervisor.end_with_launcher()  # before the imports of seconds
    args = parse_training(__doc__)
    config = load_config(args.config, args.set)
    size = args.world_size or from_environment("WORLD_SIZE", 1)
    if args.dry_run:
        from warm_dist.training.dry_run import dry_run

        errors.tell(dry_run(config, size))
        return errors.EXIT_OK
    check_world_size(config, size)
    from data_pipelines.reading.loader import open_loader
    from warm_dist.training.attempt import Attempt

    Attempt(config, open_loader).run()
    return errors.EXIT_OK


if __name__ == "__main__":
    errors.run(main)
