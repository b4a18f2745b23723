"""Compute EMA weights of any length after training: `launch/ema.py RUN --length 0.08`, from train.ema_lengths' snapshots."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import check_run
from warm_dist import errors
from warm_dist.errors import CheckpointError, ConfigError
from warm_dist.paths import path_argument, place_argument

POOR = 0.05  # relative mismatch beyond which the profile is poorly approximated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=place_argument, help="the run's folder, or the s3:// URL of its checkpoint.url")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    parser.add_argument("--length", type=float, nargs="+", required=True, help="relative widths sigma_rel, e.g. 0.08")
    parser.add_argument("--nimg", type=int, help="as if training had ended there; default: at the last snapshot")
    parser.add_argument("--out", type=path_argument, help="a folder; default: RUN/weights")
    args = parser.parse_args()
    if not all(0 < length <= 0.25 for length in args.length):
        raise ConfigError(f"--length {args.length}: a relative width must be above 0 and at most 0.25")
    if args.out is None and "://" in args.run:
        raise ConfigError("--out is needed: the run is not a local folder")

    import numpy as np

    from warm_dist.checkpoints.format import SNAPSHOTS, complete_names, open_saved
    from warm_dist.checkpoints.weights import export_weights
    from warm_dist.runs.folder import EXPORTS
    from warm_dist.store.open import open_store
    from warm_dist.training import posthoc_ema
    from warm_dist.training.ema import exponent_of, kind_of

    check_run(args.run)
    store = open_store(args.run, args.endpoint_url)
    snapshots = [open_saved(store, name) for name in complete_names(store, SNAPSHOTS)]
    if not snapshots:
        raise CheckpointError(f"{args.run}: no snapshots; set train.ema_lengths=[0.05,0.1] and train.snapshot_nimg")
    nimg = snapshots[-1].meta["nimg"] if args.nimg is None else args.nimg
    if nimg <= 0:
        raise ConfigError(f"--nimg {nimg}: needs a number above 0")
    held = [(saved, length) for saved in snapshots for length in saved.meta["config"]["train"]["ema_lengths"]]
    times = np.array([float(saved.meta["nimg"]) for saved, _ in held])
    gammas = np.array([exponent_of(length) for _, length in held])
    for length in args.length:
        wanted = float(nimg), exponent_of(length)
        factors = posthoc_ema.combination(times, gammas, *wanted)
        far = posthoc_ema.mismatch(factors, times, gammas, *wanted)
        parts = [(saved, kind_of(known), float(c)) for (saved, known), c in zip(held, factors, strict=True)]
        path = (args.out or Path(args.run) / EXPORTS) / f"{kind_of(length)}_{nimg:012d}.safetensors"
        export_weights(parts, path)
        warning = "  POOR: choose a length nearer to the tracked ones, or keep more snapshots" if far > POOR else ""
        source = f"length {length:g} at nimg {nimg} from {len(snapshots)} snapshots"
        errors.tell(f"{path}: {source}, profile met to {far:.2%}{warning}")
    return errors.EXIT_OK


if __name__ == "__main__":
    errors.run(main)
