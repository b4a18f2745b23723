"""Export a run's weights as one safetensors file with its config: `launch/export.py RUN [--kind ema|master]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import check_run
from warm_dist import errors
from warm_dist.errors import CheckpointError, ConfigError
from warm_dist.paths import path_argument, place_argument


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=place_argument, help="the run's folder, or the s3:// URL of its checkpoint.url")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    parser.add_argument("--kind", default="ema", help="ema (default), master (the last weights) or ema_0.05 …")
    parser.add_argument("--nimg", type=int, help="which checkpoint; default: the newest intact one")
    parser.add_argument("--out", type=path_argument, help="default: RUN/weights/KIND.safetensors")
    args = parser.parse_args()
    if args.out is None and "://" in args.run:
        raise ConfigError("--out is needed: the run is not a local folder")

    from warm_dist.checkpoints.format import CHECKPOINTS, complete_names, name_of, nimg_of, open_saved
    from warm_dist.checkpoints.weights import export_weights
    from warm_dist.runs.folder import EXPORTS
    from warm_dist.store.open import open_store

    check_run(args.run)
    store = open_store(args.run, args.endpoint_url)
    names = complete_names(store, CHECKPOINTS)
    if args.nimg is not None:
        wanted = name_of(CHECKPOINTS, args.nimg)
        if wanted not in names:
            have = ", ".join(str(nimg_of(name)) for name in names) or "none"
            raise CheckpointError(f"{args.run}: no complete checkpoint at nimg {args.nimg}; complete ones: {have}")
        names = [wanted]
    out = args.out or Path(args.run) / EXPORTS / f"{args.kind}.safetensors"
    problem = "has no complete checkpoint; name a run's folder, or the s3:// URL of its checkpoint.url"
    for name in reversed(names):
        try:
            export_weights([(open_saved(store, name), args.kind, 1.0)], out)
        except ConfigError as error:
            raise ConfigError(f"--kind {args.kind}: {error}") from None
        except CheckpointError as error:
            problem = f"no intact checkpoint ({error})"
            errors.print_line(f"checkpoint skipped: {error}")
        else:
            errors.tell(f"{out}: {args.kind} weights at nimg {nimg_of(name)}")
            return errors.EXIT_OK
    raise CheckpointError(f"{args.run}: {problem}")


if __name__ == "__main__":
    errors.run(main)
