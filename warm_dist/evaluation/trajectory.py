"""Pictures of the process: real images along the forward path, samples along the sampler's steps."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from warm_dist import rng
from warm_dist.checkpoints.weights import Model, load_guide
from warm_dist.config.run import SamplerConfig
from warm_dist.data import centre, to_uint8
from warm_dist.diffusion.process import ORIGIN, Point, corrupt, level_at
from warm_dist.diffusion.samplers import schedule
from warm_dist.diffusion.spectrum import blur
from warm_dist.evaluation.generate import draw_labels, generate
from warm_dist.figures import save_table


def draw_forward(
    model: Model, sampler: SamplerConfig, real: NDArray[Any], args: argparse.Namespace, title: str, path: Path
) -> None:
    """Write a table of A x0 and x = A x0 + σ ε along the path, with one ε per image. Raises OutputError.

    real: (N, C, H, W) uint8.
    """
    _, points = schedule(model.config, sampler)
    chosen = _chosen([*reversed(points)], args.columns)
    mean = torch.tensor(model.info.channel_mean)
    x0 = centre(torch.from_numpy(real), mean).double()
    noise = torch.from_numpy(rng.normals(args.seed, "forward picture", range(len(real)), real.shape[1:])).double()
    blurry = [to_uint8(blur(x0, level_at(point).alpha), mean).numpy() for point in chosen]
    states = [_shown(corrupt(x0, level_at(point), noise), point.sigma, model) for point in chosen]
    _save({"A x0": blurry, "x": states}, chosen, title, path)


def draw_sampling(model: Model, sampler: SamplerConfig, args: argparse.Namespace, title: str, path: Path) -> None:
    """Write a table of x, b̂ and x̂0 of samples at the sampler's steps. Raises OutputError."""
    seen: dict[Point, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(x: Tensor, level: Any, heads: Any) -> None:
        # Heun evaluates a level twice; the first evaluation of the next step replaces the second of this one
        seen[Point(float(level.sigma), float(level.alpha))] = (x, heads.blurry, heads.clean)

    labels = draw_labels(model, sampler, args.seed, range(args.n))
    if args.label is not None:
        labels[:] = args.label
    guide = load_guide(sampler, model.info)
    device = torch.device("cpu")
    images = generate(model, range(args.n), labels, seed=args.seed, device=device, batch_size=args.n, sampler=sampler,
                      guide=guide, watch=watch)  # fmt: skip
    chosen = _chosen([*seen], args.columns - 1)
    mean = torch.tensor(model.info.channel_mean)
    states = [_shown(seen[p][0], p.sigma, model) for p in chosen]
    blurry, clean = ([to_uint8(seen[p][k], mean).numpy() for p in chosen] for k in (1, 2))
    _save({"x": [*states, images], "b̂": [*blurry, images], "x̂0": [*clean, images]}, [*chosen, ORIGIN], title, path)


def _chosen(points: list[Any], count: int) -> list[Any]:
    if len(points) <= count:
        return points
    if count == 1:
        return points[:1]
    return [points[round(k * (len(points) - 1) / (count - 1))] for k in range(count)]


def _shown(x: Tensor, sigma: float, model: Model) -> NDArray[Any]:
    """x as uint8 images, scaled to the data's contrast: large σ is scaled down, clean images are unchanged."""
    scale = model.info.sigma_data / math.hypot(model.info.sigma_data, sigma)
    return to_uint8(x * scale, torch.tensor(model.info.channel_mean)).numpy()


def _save(rows: dict[str, list[NDArray[np.uint8]]], points: Sequence[Point], title: str, path: Path) -> None:
    """Write for each image its rows by name, with a column for each point; rows: (N, C, H, W) at each point."""
    count = len(rows["x"][0])
    table = [(name, np.stack([images[k] for images in row])) for k in range(count) for name, row in rows.items()]
    save_table(table, [_heading(point) for point in points], title, path, groups=count)


def _heading(point: Point) -> str:
    sigma, alpha = (f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in point)
    return f"σ {sigma}\nα {alpha} px"
