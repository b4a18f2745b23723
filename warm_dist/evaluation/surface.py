"""The cells of an NFE × BNR surface: measured for one network, block by block, and kept as soon as they are there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm_dist.checkpoints.weights import load_weights, weights_path
from warm_dist.config.identity import recipe
from warm_dist.config.run import Config, EvalConfig, SamplerConfig
from warm_dist.data import Reader
from warm_dist.distributed.collectives import on_main
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World
from warm_dist.errors import DataError, NumericsError
from warm_dist.evaluation.evaluator import Evaluator
from warm_dist.evaluation.sampler_choice import check_data, sampler_for, training_note, with_data
from warm_dist.files import file_sha256, make_folder, read_json, write_json

RESULTS = "results.json"


@dataclass(frozen=True)
class SurfaceOptions:
    """What to measure, and where the results go; None leaves the choice to the network's config.

    method, bnr, nfe: every combination is a cell. overrides: `sampler.key=VALUE`. blocks: of seeds, for mean and spread.
    manifest, endpoint_url: of the real images.
    """

    out: Path
    method: tuple[str | None, ...] = (None,)
    bnr: tuple[float | None, ...] = (None,)
    nfe: tuple[int | None, ...] = (None,)
    overrides: tuple[str, ...] = ()
    blocks: int = 3
    num_images: int | None = None
    batch_size: int | None = None
    manifest: str | None = None
    endpoint_url: str | None = None


def open_results(out: Path) -> dict[str, Any]:
    """The cells that OUT/results.json holds, by key; those of an older version are left out, to be measured again.

    Creates the folder. Raises DataError for a results.json of something else, OutputError.
    """
    make_folder(out)
    kept = read_json(out / RESULTS)
    if not isinstance(kept, dict) and (out / RESULTS).exists():
        raise DataError(f"{out / RESULTS}: is no results of this command; name another --out")
    return {key: cell for key, cell in (kept or {}).items() if "per_block" in cell}


class NetworkCells:
    """The cells of one weights file. Raises CheckpointError, and ConfigError for a sampler it cannot be sampled with."""

    def __init__(self, weights: Path, options: SurfaceOptions, world: World) -> None:
        self.weights, self.options, self.world = weights, options, world
        self.path: Path = on_main(world, lambda: weights_path(weights))
        model = load_weights(self.path)  # not kept: there may be many
        self.recipe, self.digest = recipe(model.config, model.info.fingerprint), file_sha256(self.path)
        config = with_data(model.config, options.manifest, options.endpoint_url)
        base = config.eval or EvalConfig(eval_nimg=config.train.batch_size, num_images=2048)
        changes = {"batch_size": options.batch_size} if options.batch_size else {}
        changes |= {"num_images": options.num_images} if options.num_images else {}
        self.config: Config = config.model_copy(update={"eval": base.model_copy(update=changes)})
        self.samplers = [
            sampler_for(config, list(options.overrides), method, nfe, bnr, spend_less=True)
            for method, bnr, nfe in itertools.product(options.method, options.bnr, options.nfe)
        ]
        for note in dict.fromkeys(training_note(config, sampler) for sampler in self.samplers):
            if note:
                self.say(f"{weights}: {note}")

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self.world.is_main:
            print(text, flush=True)

    def measure(
        self, stop: StopSignal, results: dict[str, Any], open_reader: Callable[[Config, int, int], Reader]
    ) -> list[dict[str, Any]]:
        """The cells of all samplers, in their order: first one block of each, then the next.

        results: what is there already; filled, and kept by rank 0 after each block. A collective.
        """
        world, options, model = self.world, self.options, load_weights(self.path)
        with contextlib.closing(open_reader(self.config, 0, 1)) as reader:  # only looked up in
            check_data(model.info, reader.info, self.path)
            evaluator = Evaluator(self.config, world, model.info, reader.read, options.out, self.say)
            evaluator.network.load_state_dict(model.network.state_dict())
            keys = {f"{self.digest[:16]}-{evaluator.spec(s).hash}": s for s in self.samplers}  # equal ones once
            for block, (key, sampler) in itertools.product(range(options.blocks), keys.items()):
                cell = results.setdefault(key, {"per_block": []})
                if len(cell["per_block"]) == block and "problem" not in cell:
                    self._block(evaluator, sampler, block, stop, cell, key)
                    on_main(world, lambda: write_json(options.out / RESULTS, results))
        origin = {"recipe": self.recipe, "seed": self.config.train.seed}
        return [results[key] | origin for key in keys]

    def _block(
        self, evaluator: Evaluator, sampler: SamplerConfig, block: int, stop: StopSignal, cell: dict[str, Any], key: str
    ) -> None:
        spec = evaluator.spec(sampler)
        picture = self.options.out / "samples" / f"{key}.png"
        cell |= {"weights": str(self.weights), "sha256": self.digest, "sampler": spec.sampler}
        try:
            values = evaluator.block(sampler, block, stop, str(self.weights), picture if block == 0 else None)
        except NumericsError as error:
            self.say(f"{self.weights}: {error}")
            for name in cell.keys() - {"weights", "sha256", "sampler", "per_block"}:
                del cell[name]  # the means of blocks before
            cell |= evaluator.identity(sampler) | {"problem": str(error), "frechet": None}
            return
        cell["per_block"].append(values)
        cell |= evaluator.summary(sampler, cell["per_block"], str(self.weights))
        cell["grid"] = str(picture.relative_to(self.options.out))
