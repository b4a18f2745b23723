"""The cells of an NFE x BNR surface: evaluated block by block and saved after each, then as table, CSV and metrics."""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import statistics
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
from warm_dist.errors import DataError, NumericsError, tell
from warm_dist.evaluation import surface_figure
from warm_dist.evaluation.evaluator import Evaluator
from warm_dist.evaluation.sampler_choice import check_data, sampler_for, training_note, with_data
from warm_dist.files import file_sha256, replace_file
from warm_dist.runs.folder import RESULTS, SAMPLES, read_results, write_results


@dataclass(frozen=True)
class SurfaceOptions:
    """What to evaluate, and where the results go; None means the value in the network's config.

    method, bnr, nfe: every combination is a cell. overrides: `sampler.key=VALUE`. blocks: number of blocks of seeds,
    for mean and spread. manifest, endpoint_url: of the real images.
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


_CELL = {"weights", "sha256", "sampler", "per_block", "frechet", "nfe", "bnr", "method", "name", "spec", "measure",
         "num_images"}  # fmt: skip
"""What every cell has."""


def open_results(out: Path) -> dict[str, Any]:
    """The cells in OUT/results.json by key. Raises DataError if it is damaged, or not of this command as it is now."""
    if not os.path.lexists(out / RESULTS):
        return {}
    kept = read_results(out)
    if kept is None or not all(cell.keys() >= _CELL and isinstance(cell["per_block"], list) for cell in kept.values()):
        raise DataError(
            f"{out / RESULTS}: not written by this command, or damaged; move it away, or choose another --out"
        )
    return kept


class NetworkCells:
    """The cells of one weights file. Raises CheckpointError, and ConfigError for samplers that do not suit it."""

    def __init__(self, weights: Path, options: SurfaceOptions, world: World) -> None:
        self.weights, self.options, self.world = weights, options, world
        self.path: Path = on_main(world, lambda: weights_path(weights))
        model = load_weights(self.path)  # loaded again by `measure`: there may be many networks
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
            tell(text)

    def measure(
        self, stop: StopSignal, results: dict[str, Any], open_reader: Callable[[Config, int, int], Reader]
    ) -> list[dict[str, Any]]:
        """Evaluate the cells of all samplers, one block of each at a time; returns them in the samplers' order.

        results: the cells there are; filled, and saved by rank 0 after each block. A collective.
        """
        world, options, model = self.world, self.options, load_weights(self.path)
        with contextlib.closing(open_reader(self.config, 0, 1)) as reader:  # used for `read` alone
            check_data(model.info, reader.info, self.path)
            evaluator = Evaluator(self.config, world, model.info, reader.read, options.out, self.say)
            evaluator.network.load_state_dict(model.network.state_dict())
            keys = {f"{self.digest[:16]}-{evaluator.spec(s).hash}": s for s in self.samplers}  # without duplicates
            for block, (key, sampler) in itertools.product(range(options.blocks), keys.items()):
                cell = results.setdefault(key, {"per_block": []})
                if len(cell["per_block"]) == block and "problem" not in cell:
                    self._block(evaluator, sampler, block, stop, cell, key)
                    on_main(world, lambda: write_results(options.out, results))
        origin = {"recipe": self.recipe, "seed": self.config.train.seed}
        return [results[key] | origin for key in keys]

    def _block(
        self, evaluator: Evaluator, sampler: SamplerConfig, block: int, stop: StopSignal, cell: dict[str, Any], key: str
    ) -> None:
        spec = evaluator.spec(sampler)
        picture = self.options.out / SAMPLES / f"{key}.png"
        cell |= {"weights": str(self.weights), "sha256": self.digest, "sampler": spec.sampler}
        try:
            values = evaluator.block(sampler, block, stop, str(self.weights), picture if block == 0 else None)
        except NumericsError as error:
            self.say(f"{self.weights}: {error}")
            for name in cell.keys() - {"weights", "sha256", "sampler", "per_block"}:
                del cell[name]  # the means over earlier blocks
            cell |= evaluator.identity(sampler) | {"problem": str(error), "frechet": None}
            return
        cell["per_block"].append(values)
        cell |= evaluator.summary(sampler, cell["per_block"], str(self.weights))
        cell["grid"] = str(picture.relative_to(self.options.out))


Line = dict[str, Any]
COLUMNS = ("weights", "bnr", "method", "nfe", "frechet", "spread", "blocks", "floor", "floor_n", "num_images", "kid",
           "precision", "recall", "name", "measure", "spec", "sha256")  # fmt: skip
MEASURES = ("frechet", "spread", "kid", "precision", "recall", "floor")


def write_cells(lines: list[Line], out: Path) -> None:
    """Write OUT/table.csv and, with two or more cells, OUT/surface.png. Raises OutputError."""

    def fill(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)

    replace_file(out / "table.csv", fill)
    if len(lines) > 1:
        surface_figure.draw(surface_figure.panels(lines), out / "surface.png")


def mlflow_points(lines: list[Line]) -> dict[tuple[str, int], float]:
    """MLflow metrics by (key, step), such as frechet/heun/bnr_0.5, with NFE as the step."""

    def bnr(text: str) -> str:  # without what MLflow does not allow in a metric's key
        return "".join(c if c.isalnum() or c in "_-. " else "_" for c in text)

    return {
        (f"{measure}/{line['method']}/bnr_{bnr(line['bnr'])}", line["nfe"]): float(line[measure])
        for line in lines
        for measure in MEASURES
        if line.get(measure) is not None
    }


def cells_text(lines: list[Line]) -> str:
    """A text table: one row per cell, then one for each set of networks that differ only in their seed."""
    rows = [
        f"{'weights':<34} {'BNR':>12} {'method':>12} {'NFE':>4} {'Fréchet':>9} {'spread':>7} {'floor':>7}"
        f" {'KID':>8} {'precision':>9} {'recall':>6}"
    ]
    for line in lines:
        number = "not finite" if line["frechet"] is None else f"{line['frechet']:.2f}"
        spread = "" if line.get("spread") is None else f"± {line['spread']:.2f}"
        rest = f"{line['floor']:>7.2f}" if "floor" in line else ""
        if "kid" in line:
            rest += f" {line['kid']:>8.4f} {line['precision']:>9.3f} {line['recall']:>6.3f}"
        rows.append(f"{line['weights'][-34:]:<34} {_how(line)} {number:>9} {spread:>7} {rest}".rstrip())
    return "\n".join([*rows, *_seeds(lines)])


def _seeds(lines: list[Line]) -> list[str]:
    groups: dict[tuple[str, str], dict[int, Line]] = {}
    for line in lines:
        if line["frechet"] is not None:
            groups.setdefault((line["recipe"], line["spec"]), {})[line["seed"]] = line
    rows = []
    for group in (list(seeds.values()) for seeds in groups.values() if len(seeds) > 1):
        values = [line["frechet"] for line in group]
        name = f"{len(group)} seeds as {group[0]['weights'][-22:]}"
        spread = f"± {statistics.stdev(values):.2f}   {min(values):.2f} … {max(values):.2f}"
        rows.append(f"{name:<34} {_how(group[0])} {statistics.mean(values):>9.2f} {spread}")
    return rows


def _how(line: Line) -> str:
    return f"{line['bnr']:>12} {line['method']:>12} {line['nfe']:>4}"
