"""`make sweep`: S3 and MLflow, real images packed, `launch/sweep.py --config configs/sweep_quickstart.json`, where to look.

Interrupted (Ctrl-C, SIGTERM, even kill -9), it goes on where it was; finished, it shows the results again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from launch.services import Services, pack_openmoji, services
from warm_dist import errors, supervisor
from warm_dist.config.run import validate
from warm_dist.config.sweep import load_sweep
from warm_dist.errors import Stopped

LAUNCH = Path(__file__).resolve().parent
STOP_S = 60.0  # the trials end, and the table so far is made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of S3, MLflow and the sweep")
    parser.add_argument("--config", type=Path, default=LAUNCH.parent / "configs" / "sweep_quickstart.json")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override a key; repeatable")
    args = parser.parse_args()
    sweep, base = load_sweep(args.config, args.set)
    output = args.root / Path(sweep.output).name
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with services(args.root) as servers:
            os.environ.update(servers.s3.env)  # boto3's own chain, here and in the children
            pack_openmoji(validate(base, sweep.base), servers)
            return _sweep(servers, args.config, output, args.set)
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on") from None


def _sweep(servers: Services, config: Path, output: Path, overrides: list[str]) -> int:
    """The command of the README, on our servers. Returns its exit code."""
    settings = [f"data.endpoint_url={servers.s3.endpoint_url}", f"tracking.mlflow_url={servers.mlflow_url}"]
    settings += [f"output={output}", f"node_dir={output.parent / 'node'}"]
    command = [sys.executable, str(LAUNCH / "sweep.py"), "--config", str(config)]
    command += [part for setting in [*settings, *overrides] for part in ("--set", setting)]
    command += ["--resume"] if (output / "sweep.json").exists() else []
    print(f"sweep: {' '.join(command)}", flush=True)
    process = supervisor.start(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            print("sweep: does not stop, and is ended", file=sys.stderr, flush=True)
        raise
    finally:
        supervisor.stop(process)
    if code == errors.EXIT_OK:
        port = "" if output.parent == Path("runs") else f" (python launch/ui.py --root {output.parent})"
        print(f"MLflow   make ui{port}; pictures   {output / 'results'}", flush=True)
    return code


if __name__ == "__main__":
    errors.run(main)
