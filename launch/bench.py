"""Measure this program: `launch/bench.py data|step|gpu|host|features|sweep`, or model its `scaling`. `make peers` installs peers."""

from __future__ import annotations

import argparse

from launch.benchmarks.data import data
from launch.benchmarks.result import ROOT
from launch.benchmarks.scaling import scaling
from warm_dist import errors
from warm_dist.paths import path_argument, place_argument


def main() -> int:
    from launch.benchmarks import features, gpu, host, step, sweep

    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("data", help="images/s and CPU per image of the loader and its peers, on loopback")
    command.add_argument("--images", type=int, default=10_240, help="per payload (default: %(default)s)")
    command.add_argument("--shard-size", type=int, default=5_120, help="images per shard (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=3, help="each contender once a round (default: %(default)s)")
    command.add_argument("--peers-python", type=path_argument, default=ROOT / ".venv.peers" / "bin" / "python")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=data)
    step.add_arguments(commands.add_parser("step", help="what EMAs, metrics and a second rank cost a step"))
    gpu.add_arguments(commands.add_parser("gpu", help="training step, sampling and evaluation on a GPU, beside peers"))
    host.add_arguments(commands.add_parser("host", help="what each engine costs the host, with tiny tensors"))
    features.add_arguments(commands.add_parser("features", help="what evaluation costs, beside clean-fid"))
    sweep.add_arguments(commands.add_parser("sweep", help="what Ray costs a trial, beside the same command by hand"))
    text = "a model of a step on 1 to 1024 GPUs, launch/benchmarks/scaling.py; measures nothing itself"
    command = commands.add_parser("scaling", help=text)
    command.add_argument(
        "--config", type=place_argument, default=str(ROOT / "configs" / "imagenet64.json"), help="a file of configs/"
    )
    command.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override a key")
    text = "what `gpu --json` printed: take MFU and the host's time from there instead of published figures"
    command.add_argument("--measured", type=path_argument, metavar="FILE", help=text)
    command.set_defaults(run=scaling)
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    errors.run(main)
