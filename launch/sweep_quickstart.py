"""`make sweep`: start S3 and MLflow, pack images, run `launch/sweep.py --config configs/sweep_quickstart.json`.

Interrupted (Ctrl-C, SIGTERM, even kill -9), the same command continues; finished, it shows the results again.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from launch.arguments import LAUNCH, quickstart_parser
from launch.services import Services, pack_openmoji, services, stop_child, ui_command
from warm_dist import errors, supervisor
from warm_dist.config.run import validate
from warm_dist.config.sweep import load_sweep
from warm_dist.errors import Stopped
from warm_dist.sweeps.record import RECORD

STOP_S = 60.0  # for the trials to end and the table to be written


def main() -> int:
    args = quickstart_parser(__doc__, "sweep_quickstart.json", "sweep").parse_args()
    sweep, base, origins = load_sweep(args.config, args.set)
    output = args.root / Path(sweep.output).name
    supervisor.on_request(signal.default_int_handler)
    try:
        with services(args.root) as servers:
            servers.adopt()
            pack_openmoji(validate(base, origins.base, origins.keys), servers)
            return _sweep(servers, args.config, output, args.set)
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command continues") from None


def _sweep(servers: Services, config: Path, output: Path, overrides: list[str]) -> int:
    """Run the README's command on our servers and return its exit code."""
    settings = [*servers.settings, f"output={output}", f"node_dir={output.parent / 'node'}"]
    command = [sys.executable, str(LAUNCH / "sweep.py"), "--config", str(config)]
    command += [part for setting in [*settings, *overrides] for part in ("--set", setting)]
    command += ["--resume"] if (output / RECORD).exists() else []
    errors.tell(f"sweep: {' '.join(command)}")
    process = supervisor.start(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        stop_child(process, signal.SIGINT, STOP_S, STOP_S)  # once: a second one would skip the table
        raise
    finally:
        supervisor.stop(process)
    if code == errors.EXIT_OK:
        errors.tell(f"MLflow   {ui_command(output.parent)}; figures   {output / 'results'}")
    return code


if __name__ == "__main__":
    errors.run(main)
