"""Fréchet distances of trained networks: `launch/evaluate.py RUN... --nfe 9,18,35,79 --bnr 0,0.1,0.3,0.5,0.65,1,2,10`.

Every combination of weights, BNR, method and NFE is one entry of OUT/results.json, measured with several blocks of
seeds; what stands there is not done again. OUT also gets table.csv and surface.png, and MLflow a run for each network.
Networks that differ by train.seed alone get a line of their mean and spread. Runs on one process, or under torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import evaluation_table, sampling
from warm_dist import errors
from warm_dist.checkpoints.weights import weights_path
from warm_dist.config.identity import recipe
from warm_dist.errors import ConfigError, DataError, NumericsError, UnreachableError

if TYPE_CHECKING:
    from warm_dist.config.run import Config, SamplerConfig
    from warm_dist.distributed.stop import StopSignal
    from warm_dist.distributed.world import World
    from warm_dist.evaluation import Evaluator


PATIENCE_S = 3600  # of a rank with a batch less, or whose file is cached: a batch of a large network takes minutes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def many(flag: str, text: str) -> None:
        parser.add_argument(flag, nargs="+", default=[], metavar="A,B", help=text)

    where = "finished runs' folders, checkpoints (RUN/checkpoints/NIMG), or files of launch/export.py"
    parser.add_argument("weights", type=Path, nargs="+", help=where)
    many("--bnr", "default: the config's path")
    many("--method", "default: the config's")
    many("--nfe", "network evaluations an image; where a method cannot spend all, one less (heun's are odd)")
    sampling.add_set(parser)
    parser.add_argument("--num-images", type=int, help="of a block; default: the config's eval.num_images, else 2048")
    parser.add_argument("--blocks", type=int, default=3, help="of seeds, for mean and spread (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="default: the config's eval.batch_size, else 64")
    parser.add_argument("--manifest", help="the real images; default: the config's data.manifest")
    parser.add_argument("--endpoint-url", help="of the manifest; default: the config's data.endpoint_url")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of all that is written")
    parser.add_argument("--mlflow-url", help="default: the config's tracking.mlflow_url; none: ''")
    args = parser.parse_args()
    args.bnr, args.nfe = _numbers("--bnr", args.bnr, float), _numbers("--nfe", args.nfe, int)
    args.method = [name for text in args.method for name in text.split(",") if name] or [None]
    for flag, value, least in (
        ("--num-images", args.num_images, 2),
        ("--batch-size", args.batch_size, 1),
        ("--blocks", args.blocks, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{flag} {value}: must be at least {least}")
    if args.mlflow_url and not args.mlflow_url.startswith(("http://", "https://")):
        raise ConfigError(f"--mlflow-url {args.mlflow_url}: needs the address of a server, http://… or https://…")
    if any(value is not None and not 0 <= value < math.inf for value in args.bnr):
        raise ConfigError("--bnr must be finite and not negative")
    return args


def _numbers(flag: str, texts: list[str], kind: type[float] | type[int]) -> list[Any]:
    """Numbers between commas or spaces, each once; [None] for none at all."""
    try:
        return list(dict.fromkeys(kind(part) for text in texts for part in text.split(",") if part)) or [None]
    except ValueError:
        raise ConfigError(f"{flag} {' '.join(texts)}: needs numbers, such as 9,18,35") from None


def main() -> int:
    args = parse()
    from warm_dist.distributed.collectives import on_main
    from warm_dist.distributed.stop import StopSignal
    from warm_dist.distributed.world import join, set_threads, shutdown

    stop = StopSignal().install()
    set_threads()
    world = join(PATIENCE_S)
    results = on_main(world, lambda: _open_results(args.out))
    networks = [Network(weights, args, world) for weights in args.weights]  # all are legal before any is sampled
    found: list[list[dict[str, Any]]] = []
    for network in networks:
        found.append(network.measure(stop, results))
        lines = [line for part in found for line in part]
        on_main(world, lambda lines=lines: evaluation_table.write(lines, args.out))  # type: ignore[misc]
    shutdown()
    if world.is_main:  # alone, since a server may take its time
        print(evaluation_table.text(lines))
        for network, part in zip(networks, found, strict=True):
            _log(network, part, args)
    return errors.EXIT_OK


def _open_results(out: Path) -> dict[str, Any]:
    from warm_dist.files import make_folder, read_json

    make_folder(out)
    kept = read_json(out / "results.json")
    if not isinstance(kept, dict) and (out / "results.json").exists():
        raise DataError(f"{out / 'results.json'}: is no results of this command; name another --out")
    return {key: line for key, line in (kept or {}).items() if "per_block" in line}  # an older version's are done again


class Network:
    """One weights file, and the samplers to measure it with. Raises CheckpointError, and ConfigError for a sampler."""

    def __init__(self, weights: Path, args: argparse.Namespace, world: World) -> None:
        from warm_dist.checkpoints.weights import load_weights
        from warm_dist.config.run import EvalConfig
        from warm_dist.distributed.collectives import on_main
        from warm_dist.files import file_sha256

        self.weights, self.args, self.world = weights, args, world
        self.path: Path = on_main(world, lambda: weights_path(weights))
        model = load_weights(self.path)  # not kept: there may be many
        self.recipe, self.digest = recipe(model), file_sha256(self.path)
        config = sampling.with_data(model.config, args.manifest, args.endpoint_url)
        base = config.eval or EvalConfig(eval_nimg=config.train.batch_size, num_images=2048)
        changes = {"batch_size": args.batch_size} if args.batch_size else {}
        changes |= {"num_images": args.num_images} if args.num_images else {}
        self.config: Config = config.model_copy(update={"eval": base.model_copy(update=changes)})
        grid = itertools.product(args.method, args.bnr, args.nfe)
        self.samplers = [
            sampling.sampler_for(config, args.set, method, nfe, bnr, spend_less=True) for method, bnr, nfe in grid
        ]
        for note in dict.fromkeys(sampling.training_note(config, sampler) for sampler in self.samplers):
            if note:
                self.say(f"{weights}: {note}")

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def measure(self, stop: StopSignal, results: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of all samplers. Rank 0 keeps each block as soon as it is there: first one of each, then the next."""
        from data_pipelines.loader import open_loader
        from warm_dist.checkpoints.weights import load_weights
        from warm_dist.evaluation import Evaluator
        from warm_dist.store.open import open_store

        world, args, model = self.world, self.args, load_weights(self.path)
        with contextlib.closing(open_loader(self.config, 0, 1)) as loader:  # only looked up in
            sampling.check_data(model.info, loader.manifest.info, self.path)
            evaluator = Evaluator(self.config, world, model.info, loader.read, args.out, self.say, open_store)
            evaluator.network.load_state_dict(model.network.state_dict())
            keys = {f"{self.digest[:16]}-{evaluator.spec(s).hash}": s for s in self.samplers}  # equal ones once
            for block, (key, sampler) in itertools.product(range(args.blocks), keys.items()):
                line = results.setdefault(key, {"per_block": []})
                if len(line["per_block"]) == block and "problem" not in line:
                    self._block(evaluator, sampler, block, stop, line, key)
                    self._keep(results)
        origin = {"recipe": self.recipe, "seed": self.config.train.seed}
        return [results[key] | origin for key in keys]

    def _block(
        self, evaluator: Evaluator, sampler: SamplerConfig, block: int, stop: StopSignal, line: dict[str, Any], key: str
    ) -> None:
        spec = evaluator.spec(sampler)
        picture = self.args.out / "samples" / f"{key}.png"
        line |= {"weights": str(self.weights), "sha256": self.digest, "sampler": spec.sampler}
        try:
            values = evaluator.block(sampler, block, stop, str(self.weights), picture if block == 0 else None)
        except NumericsError as error:
            self.say(f"{self.weights}: {error}")
            for name in line.keys() - {"weights", "sha256", "sampler", "per_block"}:
                del line[name]  # the means of blocks before
            line |= evaluator.identity(sampler) | {"problem": str(error), "frechet": None}
            return
        line["per_block"].append(values)
        line |= evaluator.summary(sampler, line["per_block"], str(self.weights))
        line["grid"] = str(picture.relative_to(self.args.out))

    def _keep(self, results: dict[str, Any]) -> None:
        from warm_dist.distributed.collectives import on_main
        from warm_dist.files import write_json

        on_main(self.world, lambda: write_json(self.args.out / "results.json", results))


def _log(network: Network, lines: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """A finished MLflow run: one curve over NFE (the step) for each method and BNR. A server that is away costs a note."""
    from warm_dist.files import read_json
    from warm_dist.mlflow_client import log_finished

    tracking = network.config.tracking
    url = tracking.mlflow_url if args.mlflow_url is None else args.mlflow_url
    if not url:
        return
    parent = (read_json(network.weights / "mirror.json") or {}).get("run_id") if network.weights.is_dir() else None
    facts = {key: lines[0][key] for key in ("name", "measure", "num_images", "sha256")}
    facts |= {f"sampler.{k}": text for k, text in enumerate(sorted({line["sampler"] for line in lines}))}
    cells = sorted((line["spec"], len(line["per_block"])) for line in lines)  # more blocks are another mean
    identity = hashlib.sha256(json.dumps([facts, cells]).encode()).hexdigest()[:32]
    name = f"evaluate-{network.weights.name}"
    files = [path for path in (args.out / "table.csv", args.out / "surface.png") if path.exists()]
    try:
        log_finished(
            url,
            tracking.experiment,
            name,
            identity,
            params=facts,
            metrics=evaluation_table.points(lines),
            files=files,
            parent=parent,
        )
    except UnreachableError as error:
        network.say(f"not logged: {error}; the same command logs it when the server is back")


if __name__ == "__main__":
    errors.run(main, quiet=os.environ.get("RANK", "0") != "0")
