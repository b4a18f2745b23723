"""`make ui`: serve MLflow, with its S3, on the quickstart's data until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path

from launch.services import services
from warm_dist import errors, supervisor
from warm_dist.errors import ConfigError, UnreachableError
from warm_dist.paths import path_argument


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=path_argument, default=Path("runs"), help="the quickstart's --root")
    parser.add_argument("--port", type=int, default=5000, help="MLflow's port (make ui UI_PORT=N)")
    args = parser.parse_args()
    if not (args.root / "mlflow.db").exists():
        raise ConfigError(f"{args.root}: no MLflow data yet; run make quickstart first, or give its --root")
    supervisor.on_request(signal.default_int_handler)
    try:
        with services(args.root, args.port) as running:
            errors.tell(f"MLflow: {running.mlflow_url} (Ctrl-C to stop)")
            while running.mlflow.poll() is None:
                time.sleep(0.5)
    except KeyboardInterrupt:
        return errors.EXIT_OK
    raise UnreachableError(f"MLflow ended unexpectedly; see {args.root / 'mlflow.log'}")


if __name__ == "__main__":
    errors.run(main)
