"""Run a sweep on Ray Tune: `python launch/sweep.py --config configs/sweep_bnr.json`; each trial is the training command.

It starts Ray on this machine, or joins the cluster of RAY_ADDRESS. All trials are checked before anything starts. After a
stop or kill, the same command with --resume continues, also on another cluster; ended trials do not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from warm_dist import errors, supervisor
from warm_dist.config.sweep import load_sweep
from warm_dist.errors import Stopped
from warm_dist.files import claimed
from warm_dist.paths import path_argument
from warm_dist.store.lease import Lease
from warm_dist.store.open import open_store
from warm_dist.sweeps.session import Session, describe
from warm_dist.sweeps.trial_process import make_paths
from warm_dist.sweeps.trials import trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=path_argument, required=True, help="a file configs/sweep_*.json")
    text = "override a key of the sweep (output, trial.max_failures, …) or of its trials (data.endpoint_url, …); repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help=text)
    parser.add_argument("--resume", action="store_true", help="continue the sweep in output")
    parser.add_argument("--retry-failed", action="store_true", help="with --resume: also run failed trials again")
    parser.add_argument("--dry-run", action="store_true", help="check and list the trials; stop")
    parser.add_argument("--driver", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.retry_failed and not args.resume:
        parser.error("--retry-failed needs --resume")
    if not (args.dry_run or args.driver):  # supervised, because Ray's helpers may outlive the driver by a minute
        return supervisor.run([sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--driver"])
    try:
        return drive(args)
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command with --resume continues") from None


def drive(args: argparse.Namespace) -> int:
    """Run the sweep in this process and return the exit code."""
    sweep, base, origins = load_sweep(args.config, args.set)
    every = trials(sweep, base, origins)
    if args.dry_run:
        errors.tell(describe(sweep, every))
        return errors.EXIT_OK
    paths = make_paths(sweep, "", None)
    remote = open_store(paths.output, paths.endpoint_url) if paths.remote else None
    with Lease(remote, "owner.json", "sweep") if remote else claimed(Path(paths.output), "sweep"):
        return Session(sweep, every, paths).run(args.resume, args.retry_failed)


if __name__ == "__main__":
    errors.run(main)
