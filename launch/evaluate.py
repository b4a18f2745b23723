"""Fréchet distances of trained networks: `launch/evaluate.py RUN... --bnr 0.1 0.5 1 2 --method heun multistep --nfe 35`.

Every combination of weights, BNR, method and NFE is one line of OUT/results.json; what stands there is not done again.
Networks that differ by train.seed alone get a line of their mean and spread. Runs on one process, or under torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import sampling
from warm_dist import errors
from warm_dist.errors import ConfigError

if TYPE_CHECKING:
    from warm_dist.generate import Model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="+", help="finished runs' folders, or files of launch/export.py")
    parser.add_argument("--bnr", type=float, nargs="+", default=[None], help="default: the config's path")
    parser.add_argument("--method", nargs="+", default=[None], help="default: the config's")
    parser.add_argument("--nfe", type=int, nargs="+", default=[None], help="default: the config's")
    sampling.add_set(parser)
    parser.add_argument("--num-images", type=int, help="default: the config's eval.num_images, else 2048")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--manifest", help="the real images; default: the config's data.manifest")
    parser.add_argument("--endpoint-url", help="of the manifest; default: the config's data.endpoint_url")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of results.json and sample grids")
    args = parser.parse_args()
    if (args.num_images is not None and args.num_images < 2) or args.batch_size < 1:
        raise ConfigError("--num-images must be at least 2, --batch-size positive")
    if any(value is not None and not 0 <= value < math.inf for value in args.bnr):
        raise ConfigError("--bnr must be finite and not negative")
    return args


def main() -> int:
    args = parse()
    from warm_dist import distributed
    from warm_dist.metrics import make_folder, read_json

    stop = distributed.StopSignal().install()
    distributed.set_threads()
    world = distributed.init(120)

    def open_results() -> dict[str, Any]:
        make_folder(args.out)
        return read_json(args.out / "results.json") or {}

    results = distributed.on_main(world, open_results)
    lines = [line for weights in args.weights for line in _evaluate(weights, args, world, stop, results)]
    if world.is_main:
        print(_table(lines))
    distributed.shutdown()
    return errors.EXIT_OK


def _evaluate(weights: Path, args: argparse.Namespace, world: Any, stop: Any, results: dict[str, Any]) -> list[Any]:
    """One weights file under every sampler asked for; rank 0 keeps each line as soon as it is there."""
    from data_pipelines.loader import open_loader
    from warm_dist.bnr import describe
    from warm_dist.config import EvalConfig
    from warm_dist.evaluation import Evaluator
    from warm_dist.generate import load_weights
    from warm_dist.metrics import write_json

    path = sampling.weights_path(weights)
    model = load_weights(path, world.device)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    origin = {"recipe": _recipe(model), "seed": model.config.train.seed}
    config = sampling.with_data(model.config, args.manifest, args.endpoint_url)
    base = config.eval or EvalConfig(eval_nimg=config.train.batch_size, num_images=2048)
    changes = {"batch_size": args.batch_size} | ({"num_images": args.num_images} if args.num_images else {})
    config = config.model_copy(update={"eval": base.model_copy(update=changes)})
    grid = itertools.product(args.method, args.bnr, args.nfe)
    samplers = [sampling.sampler_for(config, args.set, method, nfe, bnr) for method, bnr, nfe in grid]

    def say(text: str) -> None:
        if world.is_main:
            print(text, flush=True)

    lines = []
    with contextlib.closing(open_loader(config, world.rank, world.size)) as loader:
        sampling.check_data(model.info, loader.manifest.info, path)
        evaluator = Evaluator(config, world, model.info, loader.read, args.out, say)
        evaluator.network.load_state_dict(model.network.state_dict())
        for sampler in samplers:
            spec = evaluator.spec(sampler)
            key = f"{digest[:16]}-{spec.hash}"
            if key not in results:
                picture = args.out / "samples" / f"{key}.png"
                values = evaluator.measure(sampler, stop, picture, str(weights))
                bnr = describe(config.process.bnr if sampler.bnr is None else sampler.bnr)
                results[key] = {"weights": str(weights), "sha256": digest, "bnr": bnr, "method": sampler.method,
                                "nfe": spec.nfe, "sampler": spec.sampler, **values}  # fmt: skip
                if world.is_main:
                    write_json(args.out / "results.json", results)
            lines.append(results[key] | origin)
    return lines


def _recipe(model: Model) -> str:
    """A hash of what made the weights but chance (train.seed): data, process, network, training, precision."""
    from warm_dist.config_file import dump

    tree = dump(model.config)
    made_by = {key: tree[key] for key in ("process", "network", "train")}
    del made_by["train"]["seed"]
    text = json.dumps([made_by, tree["parallel"]["precision"], model.info.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _table(lines: list[dict[str, Any]]) -> str:
    rows = [f"{'weights':<40} {'BNR':>12} {'method':>12} {'NFE':>5} {'Fréchet':>9} {'floor':>7}"]
    rows += [
        f"{line['weights'][-40:]:<40} {_how(line)} {line['frechet']:>9.2f} {line['floor']:>7.2f}" for line in lines
    ]
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["recipe"], line["spec"]), {})[line["seed"]] = line
    for group in (list(seeds.values()) for seeds in groups.values() if len(seeds) > 1):
        values = [line["frechet"] for line in group]
        name = f"{len(group)} seeds as {group[0]['weights'][-28:]}"
        spread = f"± {statistics.stdev(values):.2f}   {min(values):.2f} … {max(values):.2f}"
        rows.append(f"{name:<40} {_how(group[0])} {statistics.mean(values):>9.2f} {spread}")
    return "\n".join(rows)


def _how(line: dict[str, Any]) -> str:
    return f"{line['bnr']:>12} {line['method']:>12} {line['nfe']:>5}"


if __name__ == "__main__":
    errors.run(main)
