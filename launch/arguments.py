"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pydantic import TypeAdapter

from warm_dist.config.explain import shown
from warm_dist.config.values import NonNegative, model_name
from warm_dist.errors import ConfigError
from warm_dist.paths import path_argument

MOST = 2**31 - 1
"""Of what a flag counts."""
LAUNCH = Path(__file__).resolve().parent


def parse_training(description: str | None) -> argparse.Namespace:
    """Parse the arguments of launch/train.py, which launch/node.py shares."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=path_argument, required=True, help="a file of configs/")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override a key; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print config, batch size, parameters and memory; stop")
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of processes to plan for")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    args = parser.parse_args()
    if args.world_size is not None and (not args.dry_run or args.world_size < 1):
        parser.error("--world-size takes a positive number, together with --dry-run")
    return args


def as_bnr(text: str) -> float:
    """A word of --bnr as a number that a config takes too. Raises ConfigError."""
    try:
        return TypeAdapter(NonNegative).validate_python(float(text))
    except ValueError:
        raise ConfigError(f"--bnr {text}: needs 0 or a number from 1e-15 to 1e15") from None


def check_range(flags: dict[str, tuple[int | None, int] | tuple[int | None, int, int]]) -> None:
    """Check {flag: (value, least)} or (value, least, most); None is a flag that was not given. Raises ConfigError."""
    for flag, (value, least, *most) in flags.items():
        top = most[0] if most else MOST
        if value is not None and not least <= value <= top:
            raise ConfigError(f"{flag} {shown(value)}: needs a number from {least} to {top}")


def check_label(label: int | None, num_classes: int) -> None:
    """Check --label against the network's classes. Raises ConfigError."""
    if label is not None and not num_classes:
        raise ConfigError(f"--label {label}: this network has no classes; leave it out")
    if label is not None and not 0 <= label < num_classes:
        raise ConfigError(f"--label {label}: needs a class of this network, from 0 to {num_classes - 1}")


def check_memory(flag: str, count: int, num_bytes: int) -> None:
    """Check that `count` images of `num_bytes` each fit into this machine's memory. Raises ConfigError."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if count * num_bytes > there:
        raise ConfigError(
            f"{flag} {count}: needs {count * num_bytes / 1e9:,.0f} GB of memory, this machine has {there / 1e9:,.0f}"
        )


def check_model_name(flag: str, name: str) -> None:
    """Check the name of a registered model. Raises ConfigError."""
    try:
        model_name(name)
    except ValueError as error:
        raise ConfigError(f"{flag} {shown(name)}: {error}") from None


def check_run(run: str) -> None:
    """Check that a run's folder exists; a URL is looked at by its store. Raises ConfigError."""
    if "://" not in run and not Path(run).is_dir():
        raise ConfigError(f"{run}: is no folder; name a run's, or the s3:// URL of its checkpoint.url")


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add `--set sampler.key=VALUE`, for sampler keys without a flag of their own."""
    text = "override any key of the sampler section, e.g. sampler.eta=0.5 or sampler.guidance=2; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="sampler.key=VALUE", help=text)


def quickstart_parser(description: str | None, config: str, what: str) -> argparse.ArgumentParser:
    """The arguments that both quickstarts share. config: default file of configs/; what: "run" or "sweep"."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=path_argument, default=Path("runs"), help=f"folder of S3, MLflow and the {what}")
    parser.add_argument("--config", type=path_argument, default=LAUNCH.parent / "configs" / config)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override a key; repeatable")
    return parser
