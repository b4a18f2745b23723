"""Pictures of the process: `launch/trajectory.py RUN --bnr 0 0.5 2` draws real images on their way up, samples on theirs down.

For each path OUT/forward_PATH.png (A x0 and x at rising levels) and OUT/sampling_PATH.png (x, b̂ and x̂0 at each step). Without
--bnr the path is the run's own: hot, warm or cold.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import sampling
from warm_dist import errors
from warm_dist.checkpoints.weights import weights_path
from warm_dist.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from warm_dist.checkpoints.weights import Model
    from warm_dist.config.run import SamplerConfig
    from warm_dist.diffusion.process import Point


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "weights", metavar="RUN", type=Path, help="a finished run's folder, or a file of launch/export.py"
    )
    parser.add_argument("--bnr", type=float, nargs="+", default=[None], help="constant paths; default: the run's own")
    parser.add_argument("--method", help="default: the config's")
    parser.add_argument("--nfe", type=int, help="default: the config's")
    sampling.add_set(parser)
    parser.add_argument("--n", type=int, default=3, help="number of images")
    parser.add_argument("--columns", type=int, default=10, help="levels shown, evenly over the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", type=int, help="class of every sample; default: drawn at random")
    parser.add_argument("--manifest", help="the real images; default: the config's data.manifest")
    parser.add_argument("--endpoint-url", help="of the manifest; default: the config's data.endpoint_url")
    parser.add_argument("--out", type=Path, default=Path("trajectory"), help="folder of the pictures")
    args = parser.parse_args()
    if args.n < 1 or args.columns < 2 or args.seed < 0:
        raise ConfigError("--n must be positive, --columns at least 2, --seed not negative")
    if any(value is not None and not 0 <= value < math.inf for value in args.bnr):
        raise ConfigError("--bnr must be finite and not negative")

    from data_pipelines.loader import open_loader
    from warm_dist.checkpoints.weights import load_weights
    from warm_dist.config.bnr import describe
    from warm_dist.distributed.world import set_threads

    set_threads()
    model = load_weights(weights_path(args.weights))
    if args.label is not None and not 0 <= args.label < model.config.data.num_classes:
        raise ConfigError(f"--label {args.label}: this network has {model.config.data.num_classes} classes")
    samplers = [sampling.sampler_for(model.config, args.set, args.method, args.nfe, bnr) for bnr in args.bnr]
    with contextlib.closing(
        open_loader(sampling.with_data(model.config, args.manifest, args.endpoint_url), 0, 1)
    ) as loader:
        sampling.check_data(model.info, loader.manifest.info, args.weights)
        real = loader.read(_spread(loader.manifest.info.num_images, args.n))
    for sampler in samplers:
        note = sampling.training_note(model.config, sampler)
        if note:
            print(note)
        bnr = model.config.process.bnr if sampler.bnr is None else sampler.bnr
        name = f"BNR {describe(bnr)}" if isinstance(bnr, float | int) else describe(bnr)
        stem = name.split("(")[0].replace("BNR ", "bnr_")
        forward, down = args.out / f"forward_{stem}.png", args.out / f"sampling_{stem}.png"
        _forward(model, sampler, real, args, f"Forward process, {name}", forward)
        _sampling(model, sampler, args, f"Sampling, {name}, {sampler.method}", down)
        print(f"{forward}  {down}")
    return errors.EXIT_OK


def _spread(total: int, n: int) -> NDArray[Any]:
    import numpy as np

    return np.unique(np.linspace(0, total - 1, n + 2).astype(np.int64)[1:-1]) if total > n else np.arange(total)


def _forward(
    model: Model, sampler: SamplerConfig, real: NDArray[Any], args: argparse.Namespace, title: str, path: Path
) -> None:
    """A x0 and x = A x0 + σ ε of real images along the path, one noise an image."""
    import numpy as np
    import torch

    from warm_dist import rng
    from warm_dist.data import centre, to_uint8
    from warm_dist.diffusion.process import corrupt, level_at
    from warm_dist.diffusion.samplers import schedule
    from warm_dist.diffusion.spectrum import blur
    from warm_dist.figures import save_table

    _, points = schedule(model.config, sampler)
    chosen = _chosen([*reversed(points)], args.columns)
    mean = torch.tensor(model.info.channel_mean)
    x0 = centre(torch.from_numpy(real), mean).double()
    noise = torch.from_numpy(rng.normals(args.seed, "forward picture", range(len(real)), real.shape[1:])).double()
    blurry = [to_uint8(blur(x0, level_at(point).alpha), mean).numpy() for point in chosen]
    states = [_shown(corrupt(x0, level_at(point), noise), point.sigma, model) for point in chosen]
    rows = [
        (name, np.stack([state[k] for state in part]))
        for k in range(len(real))
        for name, part in (("A x0", blurry), ("x", states))
    ]
    save_table(rows, [_heading(point) for point in chosen], title, path, groups=len(real))


def _sampling(model: Model, sampler: SamplerConfig, args: argparse.Namespace, title: str, path: Path) -> None:
    """x, b̂ and x̂0 of samples at the sampler's own steps."""
    import numpy as np
    import torch

    from warm_dist.checkpoints.weights import load_guide
    from warm_dist.data import to_uint8
    from warm_dist.diffusion.process import ORIGIN, Point
    from warm_dist.figures import save_table
    from warm_dist.generate import generate, sample_labels

    seen: dict[Point, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(x: Tensor, level: Any, heads: Any) -> None:
        # Heun's second evaluation of a level is followed by the first of the next step there, which replaces it
        seen[Point(float(level.sigma), float(level.alpha))] = (x, heads.blurry, heads.clean)

    labels = sample_labels(args.seed, range(args.n), model.config.data.num_classes)
    if args.label is not None:
        labels[:] = args.label
    guide = load_guide(sampler, model.info)
    device = torch.device("cpu")
    images = generate(model, range(args.n), labels, seed=args.seed, device=device, batch_size=args.n, sampler=sampler,
                      guide=guide, watch=watch)  # fmt: skip
    chosen = _chosen([*seen], args.columns - 1)
    mean = torch.tensor(model.info.channel_mean)
    columns: list[list[NDArray[Any]]] = [[_shown(seen[p][0], p.sigma, model) for p in chosen] + [images]]
    columns += [[to_uint8(seen[p][k], mean).numpy() for p in chosen] + [images] for k in (1, 2)]
    rows = [
        (name, np.stack([states[k] for states in part]))
        for k in range(args.n)
        for name, part in zip(("x", "b̂", "x̂0"), columns, strict=True)
    ]
    save_table(rows, [_heading(point) for point in [*chosen, ORIGIN]], title, path, groups=args.n)


def _chosen(points: list[Any], count: int) -> list[Any]:
    if len(points) <= count:
        return points
    return [points[round(k * (len(points) - 1) / (count - 1))] for k in range(count)]


def _shown(x: Tensor, sigma: float, model: Model) -> NDArray[Any]:
    """Noise of σ 80 is scaled down to the data's own contrast; images keep theirs."""
    import torch

    from warm_dist.data import to_uint8

    scale = model.info.sigma_data / math.hypot(model.info.sigma_data, sigma)
    return to_uint8(x * scale, torch.tensor(model.info.channel_mean)).numpy()


def _heading(point: Point) -> str:
    sigma, alpha = (f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in point)
    return f"σ {sigma}\nα {alpha} px"


if __name__ == "__main__":
    errors.run(main)
