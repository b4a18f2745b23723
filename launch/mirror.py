"""Copy a run to MLflow: `python launch/mirror.py RUN` sends what is missing, --follow keeps sending until the run ends.

Training starts it with --follow if tracking.mlflow_url is set, as a separate process, so that MLflow can neither delay
nor stop the run. It ends after the run, or the process that started it, with a bounded number of retries.
"""

from __future__ import annotations

import argparse
import os

from launch.arguments import check_model_name
from warm_dist import errors, supervisor
from warm_dist.config.urls import check_url
from warm_dist.paths import path_argument
from warm_dist.tracking.follow import mirror_run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="a run's folder, e.g. runs/quickstart")
    parser.add_argument("--follow", action="store_true", help="keep sending until the run's exit.json appears")
    parser.add_argument("--url", help="default: the run's tracking.mlflow_url")
    parser.add_argument("--register", metavar="NAME", help="register the finished run's model under this name")
    args = parser.parse_args()
    if args.url is not None:
        check_url(args.url, server=True, flag="--url")
    if args.register is not None:
        check_model_name("--register", args.register)
    if args.follow:
        os.nice(10)  # training has priority
    owner = os.environ.get(supervisor.OWNER) if args.follow else None
    mirror_run(args.run, args.url, args.register, owner, args.follow)
    return errors.EXIT_OK


if __name__ == "__main__":
    errors.run(main)
