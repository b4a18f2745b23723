"""Measure Fréchet distances of trained networks: `launch/evaluate.py RUN... --nfe 9,18,35,79 --bnr 0,0.1,0.3,0.5,1,2`.

Every combination of weights, BNR, method and NFE is an entry of OUT/results.json, measured with several blocks of seeds;
existing entries are kept. OUT also gets table.csv and surface.png, and MLflow a run for each network. Networks that
differ only in train.seed also get a line with their mean and spread. Runs in one process or under torchrun.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import add_set, as_bnr, check_range
from warm_dist import errors, supervisor
from warm_dist.config.urls import check_url
from warm_dist.errors import AccessError, ConfigError, UnreachableError
from warm_dist.files import claimed
from warm_dist.paths import path_argument, place_argument
from warm_dist.runs.folder import MIRROR, Mirrored

if TYPE_CHECKING:
    from warm_dist.evaluation.surface import NetworkCells

PATIENCE_S = 3600  # for ranks to wait for each other: a batch of a large network takes minutes


def parse() -> argparse.Namespace:
    """Parse and check the command line. Raises ConfigError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def many(flag: str, text: str) -> None:
        parser.add_argument(flag, nargs="+", default=[], metavar="A,B", help=text)

    where = "finished runs' folders, checkpoints (RUN/checkpoints/NIMG), or files of launch/export.py"
    parser.add_argument("weights", type=path_argument, nargs="+", help=where)
    many("--bnr", "default: the config's path")
    many("--method", "default: the config's")
    many("--nfe", "network evaluations per image; one less where a method cannot use all (heun needs odd numbers)")
    add_set(parser)
    parser.add_argument("--num-images", type=int, help="per block; default: the config's eval.num_images, else 2048")
    parser.add_argument("--blocks", type=int, default=3, help="of seeds, for mean and spread (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="default: the config's eval.batch_size")
    parser.add_argument("--manifest", type=place_argument, help="the real images; default: the config's data.manifest")
    parser.add_argument("--endpoint-url", help="of the manifest; default: the config's data.endpoint_url")
    parser.add_argument("--out", type=path_argument, default=Path("evaluation"), help="output folder")
    parser.add_argument("--mlflow-url", help="default: the config's tracking.mlflow_url; '' for none")
    args = parser.parse_args()
    args.bnr, args.nfe = _numbers("--bnr", args.bnr, as_bnr), _numbers("--nfe", args.nfe, int)
    args.method = _parts("--method", args.method) or [None]
    check_range(
        {"--num-images": (args.num_images, 2), "--batch-size": (args.batch_size, 1), "--blocks": (args.blocks, 1)}
    )
    if args.mlflow_url:
        check_url(args.mlflow_url, server=True, flag="--mlflow-url")
    return args


def _numbers(flag: str, texts: list[str], kind: Callable[[str], float]) -> list[Any]:
    """The distinct numbers in texts separated by commas; [None] if there are none."""
    try:
        return list(dict.fromkeys(map(kind, _parts(flag, texts)))) or [None]
    except ValueError:
        raise ConfigError(f"{flag} {' '.join(texts)}: needs numbers, such as 9,18,35") from None


def _parts(flag: str, texts: list[str]) -> list[str]:
    """What stands between the commas of all texts. Raises ConfigError for an empty part."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    if not all(parts):
        raise ConfigError(
            f"{flag} {' '.join(map(repr, texts))}: has an empty entry; write A,B or A B, or leave out {flag}"
        )
    return parts


def main() -> int:
    supervisor.end_with_launcher()
    args = parse()
    with ExitStack() as locks:
        return evaluate(args, locks)


def evaluate(args: argparse.Namespace, locks: ExitStack) -> int:
    """Measure all cells and return the exit code. locks: gets that of the output folder."""
    from data_pipelines.reading.loader import open_loader
    from warm_dist.distributed.collectives import on_main
    from warm_dist.distributed.stop import StopSignal
    from warm_dist.distributed.world import join, prepare_host, shutdown
    from warm_dist.evaluation.surface import NetworkCells, SurfaceOptions, cells_text, write_cells

    stop = StopSignal().install()
    prepare_host()
    with stop.at_once("waiting for its peers"):
        world = join(PATIENCE_S)
    results = on_main(world, lambda: _open(args.out, locks))
    same = ("out", "blocks", "num_images", "batch_size", "manifest", "endpoint_url")
    fields: dict[str, Any] = {key: getattr(args, key) for key in same}
    fields |= {key: tuple(getattr(args, key)) for key in ("method", "bnr", "nfe")}
    options = SurfaceOptions(**fields, overrides=tuple(args.set))
    networks = [NetworkCells(weights, options, world) for weights in args.weights]  # checks all before sampling any
    found: list[list[dict[str, Any]]] = []
    for network in networks:
        found.append(network.measure(stop, results, open_loader))
        lines = [line for part in found for line in part]
        on_main(world, lambda lines=lines: write_cells(lines, args.out))  # type: ignore[misc]
    shutdown()
    if world.is_main:  # after the other ranks have ended, because a server may be slow
        errors.tell(cells_text(lines))
        for network, part in zip(networks, found, strict=True):
            with stop.at_once("sending results to MLflow"):
                _log(network, part, args)
    return errors.EXIT_OK


def _open(out: Path, locks: ExitStack) -> dict[str, Any]:
    """The cells there are in `out`, which this process holds from now on, so that no other one overwrites them."""
    from warm_dist.evaluation.surface import open_results

    locks.enter_context(claimed(out, "evaluation"))
    return open_results(out)


def _log(network: NetworkCells, lines: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Log a network to MLflow: a curve over NFE (as step) for each method and BNR. An unreachable server is reported."""
    from warm_dist.evaluation.surface import mlflow_points
    from warm_dist.records import read_record
    from warm_dist.tracking.client import log_finished

    tracking = network.config.tracking
    url = tracking.mlflow_url if args.mlflow_url is None else args.mlflow_url
    if not url:
        return
    mirrored = read_record(network.weights / MIRROR, Mirrored) if network.weights.is_dir() else None
    facts = {key: lines[0][key] for key in ("name", "measure", "num_images", "sha256")}
    facts |= {f"sampler.{k}": text for k, text in enumerate(sorted({line["sampler"] for line in lines}))}
    cells = sorted((line["spec"], len(line["per_block"])) for line in lines)  # more blocks give another mean
    identity = hashlib.sha256(json.dumps([facts, cells]).encode()).hexdigest()[:32]
    name, metrics = f"evaluate-{network.weights.name}", mlflow_points(lines)
    files = [path for path in (args.out / "table.csv", args.out / "surface.png") if path.exists()]
    logged: dict[str, Any] = {
        "params": facts,
        "metrics": metrics,
        "files": files,
        "parent": mirrored and mirrored.run_id,
    }
    try:
        log_finished(url, tracking.experiment, name, identity, **logged)
    except (UnreachableError, AccessError) as error:
        network.say(f"not logged: {error}; the same command logs it when the server takes it")


if __name__ == "__main__":
    errors.run(main)
