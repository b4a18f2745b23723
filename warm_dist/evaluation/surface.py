"""The cells of an NFE × BNR surface, measured for one network and kept block by block."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warm_dist.checkpoints.weights import weights_path
from warm_dist.config.identity import recipe
from warm_dist.errors import DataError, NumericsError
from warm_dist.evaluation.sampler_choice import check_data, sampler_for, training_note, with_data

if TYPE_CHECKING:
    from warm_dist.config.run import Config, SamplerConfig
    from warm_dist.distributed.stop import StopSignal
    from warm_dist.distributed.world import World
    from warm_dist.evaluation.evaluator import Evaluator


def open_results(out: Path) -> dict[str, Any]:
    from warm_dist.files import make_folder, read_json

    make_folder(out)
    kept = read_json(out / "results.json")
    if not isinstance(kept, dict) and (out / "results.json").exists():
        raise DataError(f"{out / 'results.json'}: is no results of this command; name another --out")
    return {key: line for key, line in (kept or {}).items() if "per_block" in line}  # an older version's are done again


class NetworkCells:
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
        config = with_data(model.config, args.manifest, args.endpoint_url)
        base = config.eval or EvalConfig(eval_nimg=config.train.batch_size, num_images=2048)
        changes = {"batch_size": args.batch_size} if args.batch_size else {}
        changes |= {"num_images": args.num_images} if args.num_images else {}
        self.config: Config = config.model_copy(update={"eval": base.model_copy(update=changes)})
        grid = itertools.product(args.method, args.bnr, args.nfe)
        self.samplers = [sampler_for(config, args.set, method, nfe, bnr, spend_less=True) for method, bnr, nfe in grid]
        for note in dict.fromkeys(training_note(config, sampler) for sampler in self.samplers):
            if note:
                self.say(f"{weights}: {note}")

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def measure(self, stop: StopSignal, results: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of all samplers. Rank 0 keeps each block as soon as it is there: first one of each, then the next."""
        from data_pipelines.reading.loader import open_loader
        from warm_dist.checkpoints.weights import load_weights
        from warm_dist.evaluation.evaluator import Evaluator
        from warm_dist.store.open import open_store

        world, args, model = self.world, self.args, load_weights(self.path)
        with contextlib.closing(open_loader(self.config, 0, 1)) as loader:  # only looked up in
            check_data(model.info, loader.manifest.info, self.path)
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
