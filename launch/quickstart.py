"""`make quickstart`: start S3 and MLflow, pack images, run `deepspeed launch/train.py`, and show the results.

Interrupted (Ctrl-C, SIGTERM, even kill -9), the same command continues; finished, it shows the results again.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from launch.arguments import LAUNCH, quickstart_parser
from launch.services import Services, pack_openmoji, services, stop_child, ui_command
from warm_dist import errors, supervisor
from warm_dist.config.load import dump
from warm_dist.config.run import Config, load_config
from warm_dist.cpus import usable_cpus
from warm_dist.errors import ConfigError, Stopped
from warm_dist.files import read_json
from warm_dist.runs.folder import CONFIG, EXIT, METRICS, read_config, read_end
from warm_dist.runs.metrics import read_metrics

SAVE_S = 120.0  # for a stopped run to save
# The launcher ignores SIGTERM, which goes to its whole group, and so stays until its ranks have saved.
PATIENT = ["sh", "-c", 'trap "" TERM; exec "$@"', "sh"]


def main() -> int:
    parser = quickstart_parser(__doc__, "quickstart.json", "run")
    parser.add_argument("--num-ranks", type=int, default=2, help="processes (with CUDA at most one per GPU)")
    args = parser.parse_args()
    if args.num_ranks < 1:
        raise ConfigError(f"--num-ranks {args.num_ranks}: must be at least 1")
    supervisor.on_request(signal.default_int_handler)
    output = args.root / Path(load_config(args.config, args.set).output).name
    overrides = [f"output={output}", *precision(args.config), *args.set]
    quickstart = Quickstart(args.root, args.config, overrides, args.num_ranks)
    try:
        return quickstart.run()
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command continues") from None


def precision(config: Path) -> list[str]:
    """The setting of bfloat16 where the device computes in it, unless the config decides."""
    import torch

    from warm_dist.networks.precision import has_bf16

    decided = "precision" in (read_json(config) or {}).get("parallel", {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ["parallel.precision=bf16"] if has_bf16(device) and not decided else []


class Quickstart:
    """Runs the phases, times each, and reports."""

    def __init__(self, root: Path, config: Path, overrides: list[str], num_ranks: int) -> None:
        import torch

        self.root, self.config_path, self.overrides = root, config, overrides
        self.config: Config = load_config(config, overrides)
        self.output = Path(self.config.output)
        self.gpus = torch.cuda.device_count()
        self.num_ranks = min(num_ranks, self.gpus) if self.gpus else num_ranks
        self.seconds: dict[str, float] = {}

    def run(self) -> int:
        """Run all phases and return the exit code of the training."""
        from warm_dist.report.page import write_report

        begun = time.monotonic()
        with ExitStack() as stack:
            with self._timed("services"):
                servers = stack.enter_context(services(self.root))
            servers.adopt()
            with self._timed("pack"):
                pack_openmoji(self.config, servers)
            started = time.time()
            with self._timed("train"):
                code = self._train(servers)
            self.seconds["evaluate"] = sum(r["seconds"] for r in self._metrics("eval") if r["time"] >= started)
            self.seconds["train"] -= self.seconds["evaluate"]
            if (self.output / CONFIG).exists():
                with self._timed("mirror"):  # send what the run's own mirror has not, before the server stops
                    command = [sys.executable, str(LAUNCH / "mirror.py"), str(self.output)]
                    subprocess.run([*command, "--url", servers.mlflow_url])
                with self._timed("report"):
                    write_report([self.output], [], self.output / "report.html")
        if code == errors.EXIT_OK:
            errors.tell(self._report(time.monotonic() - begun))
        return code

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - begun

    def _train(self, servers: Services) -> int:
        """Run the README's training command on our servers; returns the run's own exit code, which launchers hide."""
        if self._finished():
            errors.tell(f"quickstart: {self.output} is finished; delete it to train again")
            return errors.EXIT_OK
        command = [str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_gpus", str(self.num_ranks)]
        command += ["--master_port", str(supervisor.free_port())]
        command += [str(LAUNCH / "train.py"), "--config", str(self.config_path)]
        command += [part for setting in [*self.overrides, *servers.settings] for part in ("--set", setting)]
        errors.tell(f"quickstart: {' '.join(command)}")
        exit_file = self.output / EXIT
        before = _modified(exit_file)
        threads = max(1, usable_cpus() // self.num_ranks)
        ours = {"OMP_NUM_THREADS": str(threads)} | ({} if self.gpus else {"DS_ACCELERATOR": "cpu"})
        process = supervisor.start([*PATIENT, *command], {**os.environ, **ours})
        try:
            code = process.wait()
        except KeyboardInterrupt:
            print("quickstart: stopping; the run saves first (Ctrl-C again to kill it)", flush=True)
            code = stop_child(process, signal.SIGTERM, 5.0, SAVE_S)  # repeated: a launcher may miss it as it starts
        finally:
            supervisor.stop(process)
        end = read_end(self.output) if _modified(exit_file) != before else None
        code = end.code if end else code or errors.EXIT_UNEXPECTED
        if code:
            reason = end.reason if end else "the run left no exit.json"
            errors.print_line(f"quickstart: training ended with code {code}: {reason}")
        return int(code)

    def _finished(self) -> bool:
        """Whether this config has finished; only our servers' addresses may differ."""
        end, tree = read_end(self.output), read_config(self.output)
        if not (end and tree and end.code == errors.EXIT_OK):
            return False
        ours = dump(self.config)
        for section, key in (("data", "endpoint_url"), ("tracking", "mlflow_url")):
            tree[section][key] = ours[section][key]
        return bool(tree == ours)

    def _metrics(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in read_metrics(self.output / METRICS) if r["kind"] == kind]

    def _report(self, total_s: float) -> str:
        phases = "   ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        rates = [r["images_per_s"] for r in self._metrics("train") if r.get("images_per_s")]
        rate = f"{statistics.median(rates):.0f} images/s over {self.num_ranks} processes" if rates else ""
        lines = [f"quickstart: finished in {total_s:.0f} s", f"  {phases}   {rate}", *self._distances()]
        lines += [f"  report   {self.output / 'report.html'}", f"  MLflow   {ui_command(self.root)}"]
        return "\n".join(lines)

    def _distances(self) -> list[str]:
        evaluations = self._metrics("eval")
        if not evaluations or self.config.eval is None:
            return []
        last, sampler = evaluations[-1], self.config.sampler
        first = next(r for r in evaluations if r["spec"] == last["spec"])  # other specs are not comparable
        floor, n = last["floor"], self.config.eval.num_images
        spread = "" if last.get("spread") is None else f" ± {last['spread']:.2f} over {last['blocks']} blocks of seeds"
        excess = (last["frechet"] - floor) / (first["frechet"] - floor)
        return [
            f"  {last['name']}, n = {n:,}, {sampler.method} {sampler.num_steps} steps, spec {last['spec']}",
            f"    before training {first['frechet']:8.2f}   (nimg {first['nimg']:,})",
            f"    after training  {last['frechet']:8.2f}{spread}   (nimg {last['nimg']:,})",
            f"    floor           {floor:8.2f}   (real against real, {last['floor_n']:,} images against the others)",
            f"    excess over the floor: {100 * excess:.1f} % of that before training",
            f"  samples  {self.output / last['grid']}",
        ]


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


if __name__ == "__main__":
    errors.run(main)
