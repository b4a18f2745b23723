"""Show a run in MLflow: `python launch/mirror.py RUN` sends what is missing (after an outage, say); --follow goes along.

Training starts `--follow` by itself when tracking.mlflow_url is set. It is a process of its own: whatever happens to
MLflow, the run neither waits nor stops. It ends after the run's end, or its starter's, with a bounded number of tries.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from warm_dist import errors, supervisor
from warm_dist.tracking.follow import mirror_run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, e.g. runs/quickstart")
    parser.add_argument("--follow", action="store_true", help="go along with the run until its exit.json appears")
    parser.add_argument("--url", help="another server than the run's tracking.mlflow_url")
    parser.add_argument("--register", metavar="NAME", help="register the finished run's model under this name")
    args = parser.parse_args()
    if args.follow:
        os.nice(10)  # training first
    mirror_run(
        args.run, args.url, args.register, os.environ.get(supervisor.OWNER) if args.follow else None, args.follow
    )
    return errors.EXIT_OK


if __name__ == "__main__":
    errors.run(main)
