"""Draw the forward process of real images and the sampling of new ones: `launch/trajectory.py RUN --bnr 0 0.5 2`.

Writes for each path OUT/forward_PATH.png (A x0 and x at rising levels) and OUT/sampling_PATH.png (x, b̂ and x̂0 at each
step). Without --bnr the path is the run's own: hot, warm or cold.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from launch.arguments import add_set, as_bnr, check_label, check_range
from warm_dist import errors
from warm_dist.paths import path_argument, place_argument

MOST_SHOWN = 100  # images and levels in one figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "weights", metavar="RUN", type=path_argument, help="a finished run's folder, or an exported file"
    )
    parser.add_argument("--bnr", type=as_bnr, nargs="+", default=[None], help="constant paths; default: the run's own")
    parser.add_argument("--method", help="default: the config's")
    parser.add_argument("--nfe", type=int, help="default: the config's")
    add_set(parser)
    parser.add_argument("--n", type=int, default=3, help="number of images")
    parser.add_argument("--columns", type=int, default=10, help="number of levels, evenly spaced over the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", type=int, help="class of every sample; default: drawn at random")
    parser.add_argument("--manifest", type=place_argument, help="the real images; default: the config's data.manifest")
    parser.add_argument("--endpoint-url", help="of the manifest; default: the config's data.endpoint_url")
    parser.add_argument("--out", type=path_argument, default=Path("trajectory"), help="output folder")
    args = parser.parse_args()
    check_range({"--n": (args.n, 1, MOST_SHOWN), "--columns": (args.columns, 2, MOST_SHOWN), "--seed": (args.seed, 0)})

    import numpy as np

    from data_pipelines.reading.loader import open_loader
    from warm_dist.checkpoints.weights import load_weights, weights_path
    from warm_dist.config.bnr import describe
    from warm_dist.distributed.world import prepare_host
    from warm_dist.evaluation.sampler_choice import check_data, sampler_for, training_note, with_data
    from warm_dist.evaluation.trajectory import draw_forward, draw_sampling

    prepare_host()
    model = load_weights(weights_path(args.weights))
    check_label(args.label, model.config.data.num_classes)
    samplers = [sampler_for(model.config, args.set, args.method, args.nfe, bnr) for bnr in args.bnr]
    with contextlib.closing(open_loader(with_data(model.config, args.manifest, args.endpoint_url), 0, 1)) as loader:
        check_data(model.info, loader.manifest.info, args.weights)
        total = loader.manifest.info.num_images
        spread = np.unique(np.linspace(0, total - 1, args.n + 2).astype(np.int64)[1:-1])
        real = loader.read(spread if total > args.n else np.arange(total))
    for sampler in samplers:
        note = training_note(model.config, sampler)
        if note:
            errors.tell(note)
        bnr = model.config.process.bnr if sampler.bnr is None else sampler.bnr
        name = f"BNR {describe(bnr)}" if isinstance(bnr, float | int) else describe(bnr)
        stem = name.split("(")[0].replace("BNR ", "bnr_")
        forward, down = args.out / f"forward_{stem}.png", args.out / f"sampling_{stem}.png"
        draw_forward(model, sampler, real, args, f"Forward process, {name}", forward)
        draw_sampling(model, sampler, args, f"Sampling, {name}, {sampler.method}", down)
        errors.tell(f"{forward}  {down}")
    return errors.EXIT_OK


if __name__ == "__main__":
    errors.run(main)
