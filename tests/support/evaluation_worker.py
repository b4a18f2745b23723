"""Run by test_evaluation_ranks.py in real processes: `evaluation_worker.py FOLDER LABEL BATCH_SIZE…`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.tiny_run import config, info
from warm_dist import rng
from warm_dist.config.run import Config
from warm_dist.distributed.collectives import gather
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World, join, shutdown
from warm_dist.errors import CheckpointError, DataError, NumericsError, WarmDistError
from warm_dist.evaluation import evaluator
from warm_dist.evaluation.evaluator import Evaluator
from warm_dist.evaluation.generate import sample_labels
from warm_dist.networks.unet import build_network

NUM_IMAGES = 50
CLASSES = 7
REAL = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)


def settings(folder: Path, batch_size: int) -> Config:
    changes: dict[str, Any] = {"eval_nimg": 80, "num_images": NUM_IMAGES, "extractor": "pixels", "grid": 3}
    changes |= {"batch_size": batch_size, "kid_images": 40}
    return config(
        folder / "run",
        eval=changes,
        sampler={"method": "heun", "num_steps": 4},
        data__num_classes=CLASSES,
        data__manifest=f"{folder}/data/manifest.parquet",
    )


def measured(world: World, folder: Path, label: str, batch_size: int) -> dict[str, Any]:
    """One block: its numbers, and what every image was made from and became, in FOLDER/LABEL-BATCH_SIZE.npz."""
    made: dict[int, tuple[NDArray[Any], NDArray[Any], int]] = {}
    generate = evaluator.generate

    def recorded(model: Any, indices: range, labels: NDArray[np.int64], **given: Any) -> NDArray[np.uint8]:
        images = generate(model, indices, labels, **given)
        noise = rng.normals(given["seed"], "sample", list(indices), images.shape[1:])
        made.update(zip(indices, zip(images, noise, labels.tolist(), strict=True), strict=True))
        return images

    evaluator.generate = recorded
    here = folder / label  # reference statistics of its own
    found = Evaluator(settings(here, batch_size), world, info(), lambda rows: REAL[rows], here / "run", print)
    found.network.load_state_dict(build_network(found.config).state_dict())
    values = found.block(found.config.sampler, 1, StopSignal(), "test", here / "run" / "grid.png")
    evaluator.generate = generate
    whole = {number: one for part in gather(world, made) for number, one in part.items()}
    if world.is_main:
        numbers = sorted(whole)
        assert numbers == list(range(NUM_IMAGES, 2 * NUM_IMAGES)), "block 1, each once"
        images, noise, labels = (np.stack([whole[k][part] for k in numbers]) for part in range(3))
        assert labels.tolist() == sample_labels(0, numbers, CLASSES).tolist()
        np.savez(folder / f"{label}-{batch_size}.npz", images=images, noise=noise, labels=labels)
    return values


def ends_together(world: World, folder: Path) -> list[str]:
    """One rank is told to stop, or meets an error: what every rank then raises, in turn."""
    found = Evaluator(settings(folder, 4), world, info(), lambda rows: REAL[rows], folder / "run", print)
    last = world.rank == world.size - 1
    out: list[str] = []

    def attempt(stop: StopSignal, grid: Path | None = None) -> None:
        try:
            found.block(found.config.sampler, 0, stop, "test", grid)
        except WarmDistError as error:
            out.append(f"{type(error).__name__}: {error}")

    stop = StopSignal()
    stop.name = "SIGTERM" if last else None
    attempt(stop)

    def sick(*args: Any, **given: Any) -> NDArray[np.uint8]:
        if last:
            raise NumericsError(f"a bad image on rank {world.rank}")
        return generate(*args, **given)

    def torn(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        if world.rank > 0 or world.size == 1:
            raise DataError(f"a torn shard on rank {world.rank}")
        return REAL[rows]

    generate, read = evaluator.generate, found.read
    evaluator.generate = sick
    attempt(StopSignal())
    evaluator.generate, found.read = generate, torn
    attempt(StopSignal())
    found.read = read

    def away(*args: Any) -> None:
        if last:
            raise CheckpointError(f"no guide on rank {world.rank}")

    load_guide = evaluator.load_guide
    evaluator.load_guide = away
    attempt(StopSignal())
    evaluator.load_guide = load_guide
    in_the_way = folder / "run" / "file"
    if world.is_main:
        in_the_way.parent.mkdir(parents=True, exist_ok=True)
        in_the_way.write_text("no folder")
    attempt(StopSignal(), in_the_way / "grid.png")
    return out


def main() -> None:
    folder, label, *sizes = sys.argv[1:]
    world = join(60)
    root = Path(folder)
    out: dict[str, Any] = {size: measured(world, root, label, int(size)) for size in sizes}
    out["ends"] = gather(world, ends_together(world, root / f"{label}-ends"))
    if world.is_main:
        (root / f"{label}.json").write_text(json.dumps(out))
    shutdown()


if __name__ == "__main__":
    main()
