"""Sample images from a weights file: `launch/sample.py --weights F --n 64 --nfe 35 --bnr 0.5 --seed 0 [--label 3]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import add_set, as_bnr, check_label, check_memory, check_range
from warm_dist import errors
from warm_dist.errors import ConfigError
from warm_dist.files import replace_file
from warm_dist.paths import path_argument

# network evaluations from which compiling pays on a GPU: an H100 makes 3,161 a second of configs/cifar10.json in plain
# bfloat16, and compiling takes one to two minutes
COMPILE_FROM = 300_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=path_argument, required=True, help="a finished run's folder, or an exported file"
    )
    parser.add_argument("--n", type=int, default=64, help="number of images")
    parser.add_argument("--nfe", type=int, help="network evaluations per image; default: the config's sampler")
    parser.add_argument("--bnr", type=as_bnr, help="blur-to-noise ratio; default: the one of training")
    parser.add_argument("--seed", type=int, default=0, help="image k does not depend on --n or --batch-size")
    parser.add_argument("--label", type=int, help="class of every image; default: drawn at random")
    text = "heun, first_order, multistep, churn, ancestral or cold; default: the config's"
    parser.add_argument("--method", help=text)
    add_set(parser)
    parser.add_argument(
        "--out", type=path_argument, default=Path("samples.png"), help="a grid as .png, or the images as .npy"
    )
    parser.add_argument("--batch-size", type=int, help="default: as many as fit into the GPU, 64 on a CPU")
    args = parser.parse_args()
    check_range({"--n": (args.n, 1), "--batch-size": (args.batch_size, 1), "--seed": (args.seed, 0)})
    if args.out.suffix not in (".png", ".npy"):
        raise ConfigError(f"--out {args.out}: needs a name that ends in .png or .npy")

    import numpy as np
    import torch
    from tqdm import tqdm

    from warm_dist.checkpoints.weights import load_guide, load_weights, weights_path
    from warm_dist.config.run import sampling_precision
    from warm_dist.diffusion.samplers import nfe
    from warm_dist.distributed.world import prepare_host
    from warm_dist.evaluation.generate import draw_labels, fitting_batch, generate
    from warm_dist.evaluation.sampler_choice import describe_sampling, sampler_for, training_note
    from warm_dist.figures import save_grid
    from warm_dist.networks.compiled import compile_blocks, compiles

    prepare_host()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_weights(weights_path(args.weights), device)
    config = model.config
    sampler = sampler_for(config, args.set, args.method, args.nfe, args.bnr)
    guide = load_guide(sampler, model.info, device)
    check_label(args.label, config.data.num_classes)
    note = training_note(config, sampler)
    if note:
        errors.tell(note)
    size = config.data.channels * config.data.resolution**2
    check_memory("--n", args.n, 2 * size)  # the images, and the grid or file made of them
    indices = range(args.n)
    labels = draw_labels(model, sampler, args.seed, indices)
    if args.label is not None:
        labels[:] = args.label
    batch_size = args.batch_size or fitting_batch(config, sampling_precision(config, sampler), device, args.n)
    spent = nfe(sampler.method, sampler.num_steps)
    compiled = compiles(config.parallel.compile, device) and args.n * spent >= COMPILE_FROM
    if compiled:
        compile_blocks(model.network, config.parallel.compile_cache, print)
    options = {"seed": args.seed, "device": device, "batch_size": batch_size, "sampler": sampler, "guide": guide}
    with tqdm(total=args.n, unit="image", disable=None) as bar:
        images = generate(model, indices, labels, **options, fill=compiled, progress=bar.update)
    if args.out.suffix == ".npy":

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as file:  # to a path np.save would append .npy
                np.save(file, images)

        replace_file(args.out, fill)
    else:
        save_grid(images, args.out, columns=max(1, round(args.n**0.5)))
    errors.tell(f"{args.out}: {args.n} images, NFE {spent}, seed {args.seed}, {describe_sampling(config, sampler)}")
    return errors.EXIT_OK


if __name__ == "__main__":
    errors.run(main)
