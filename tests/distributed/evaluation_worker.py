"""Run by test_evaluation_ranks.py in real processes: `evaluation_worker.py FOLDER LABEL BATCH_SIZE…`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.store import open_store
from tests.distributed.worker import config, info
from warm_dist import distributed, evaluation, rng
from warm_dist.config import Config
from warm_dist.distributed import StopSignal, World
from warm_dist.errors import NumericsError, Stopped
from warm_dist.evaluation import Evaluator
from warm_dist.generate import build_network, sample_labels

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
    generate = evaluation.generate

    def recorded(model: Any, indices: range, labels: NDArray[np.int64], **given: Any) -> NDArray[np.uint8]:
        images = generate(model, indices, labels, **given)
        noise = rng.normals(given["seed"], "sample", list(indices), images.shape[1:])
        made.update(zip(indices, zip(images, noise, labels.tolist(), strict=True), strict=True))
        return images

    evaluation.generate = recorded
    here = folder / label  # reference statistics of its own
    found = Evaluator(
        settings(here, batch_size), world, info(), lambda rows: REAL[rows], here / "run", print, open_store
    )
    found.network.load_state_dict(build_network(found.config).state_dict())
    values = found.block(found.config.sampler, 1, StopSignal(), "test", here / "run" / "grid.png")
    evaluation.generate = generate
    whole = {number: one for part in distributed.gather(world, made) for number, one in part.items()}
    if world.is_main:
        numbers = sorted(whole)
        assert numbers == list(range(NUM_IMAGES, 2 * NUM_IMAGES)), "block 1, each once"
        images, noise, labels = (np.stack([whole[k][part] for k in numbers]) for part in range(3))
        assert labels.tolist() == sample_labels(0, numbers, CLASSES).tolist()
        np.savez(folder / f"{label}-{batch_size}.npz", images=images, noise=noise, labels=labels)
    return values


def ends_together(world: World, folder: Path) -> dict[str, Any]:
    """One rank is told to stop, or makes an image that is not finite: every rank raises the same."""
    out: dict[str, Any] = {}
    found = Evaluator(settings(folder, 4), world, info(), lambda rows: REAL[rows], folder / "run", print, open_store)
    stop = StopSignal()
    if world.rank == world.size - 1:
        stop.name = "SIGTERM"
    try:
        found.block(found.config.sampler, 0, stop, "test", None)
    except Stopped:
        out["stopped"] = True
    generate = evaluation.generate

    def sick(model: Any, indices: range, *args: Any, **given: Any) -> NDArray[np.uint8]:
        if world.rank == world.size - 1:
            raise NumericsError("a bad image")
        return generate(model, indices, *args, **given)

    evaluation.generate = sick
    try:
        found.block(found.config.sampler, 0, StopSignal(), "test", None)
    except NumericsError as error:
        out["numerics"] = str(error)
    evaluation.generate = generate
    return out


def main() -> None:
    folder, label, *sizes = sys.argv[1:]
    world = distributed.init(60)
    root = Path(folder)
    out: dict[str, Any] = {size: measured(world, root, label, int(size)) for size in sizes}
    out["ends"] = distributed.gather(world, ends_together(world, root / f"{label}-ends"))
    if world.is_main:
        (root / f"{label}.json").write_text(json.dumps(out))
    distributed.shutdown()


if __name__ == "__main__":
    main()
