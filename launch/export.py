"""Export a run's weights: `launch/export.py RUN [--kind ema|master] [--nimg N] [--out FILE]`, one safetensors file with its config inside."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from warm_dist import errors
from warm_dist.errors import CheckpointError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--kind", choices=["ema", "master"], default="ema", help="averaged weights, or the last ones")
    parser.add_argument("--nimg", type=int, help="which checkpoint; default: the newest intact one")
    parser.add_argument("--out", type=Path, help="default: RUN/weights/KIND.safetensors")
    args = parser.parse_args()

    from warm_dist import checkpoint, generate

    root = args.run / "checkpoints"
    if args.nimg is not None:
        folder = checkpoint.folder_of(root, args.nimg)
        if folder not in checkpoint.complete_folders(root):
            have = ", ".join(str(int(path.name)) for path in checkpoint.complete_folders(root)) or "none"
            raise CheckpointError(f"{args.run}: no complete checkpoint at nimg {args.nimg}; complete ones: {have}")
    else:
        found = checkpoint.latest(root, lambda text: print(text, file=sys.stderr))
        if found is None:
            raise CheckpointError(f"{args.run}: has no complete checkpoint")
        folder = found[0]
    out = args.out or args.run / "weights" / f"{args.kind}.safetensors"
    generate.export_weights(folder, args.kind, out)
    print(f"{out}: {args.kind} weights at nimg {int(folder.name)}")
    return errors.EXIT_OK


if __name__ == "__main__":
    errors.run(main)
