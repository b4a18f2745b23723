"""Runs a trial: the training command in its own process group, followed through the files it writes. Without Ray.

A sweep's output is a folder that all machines share, which then holds the run folders; or it is on S3. Then a run folder
is local to its machine, checkpoints go to S3 through checkpoint.url, and `publish` uploads the small files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm_dist import errors, supervisor
from warm_dist.config.load import dump
from warm_dist.config.sweep import SweepConfig, TrialConfig
from warm_dist.errors import OutputError, Stopped, UnreachableError, WarmDistError
from warm_dist.files import locked, make_folder, write_json
from warm_dist.records import DamagedError, Record, seal, unseal
from warm_dist.runs.folder import CONFIG, EXIT, LOCK, METRICS, MIRROR, RUN, attempt_of, read_end, write_end
from warm_dist.runs.metrics import read_metrics
from warm_dist.store.base import Store
from warm_dist.store.open import open_store
from warm_dist.supervisor import free_port
from warm_dist.sweeps.trials import Trial

END_S = 10.0  # from SIGTERM to SIGKILL, for saving a checkpoint
FREE_S = 20.0  # for a killed sweep's processes to release a run folder
PATIENCE_S, RETRY_S = 600.0, 5.0  # for an S3 output that does not answer
LOOPBACK = "127.0.0.1"
# A retry would fail again: config, data, damaged checkpoint, non-finite numbers, number of processes.
_FINAL_CODES = {2, 3, 4, 5, 9}
_PUBLISHED = (CONFIG, RUN, METRICS, MIRROR, EXIT, "trial.log", "samples/*.png", "weights/*.safetensors")


@dataclass(frozen=True)
class SweepPaths:
    """Where a sweep keeps its trials, computed from its config alone. cwd: base of relative paths."""

    sweep_id: str
    output: str
    endpoint_url: str | None
    node_dir: str
    cwd: str
    parent_run_id: str | None

    @property
    def remote(self) -> bool:
        """Whether the output is on S3."""
        return "://" in self.output

    def url(self, name: str) -> str:
        """The URL or path of a trial's folder in the output."""
        return f"{self.output}/trials/{name}"

    def run(self, name: str) -> Path:
        """A trial's run folder on this machine."""
        return Path(self.node_dir) / self.sweep_id / name if self.remote else Path(self.url(name))


def make_paths(sweep: SweepConfig, sweep_id: str, parent_run_id: str | None) -> SweepPaths:
    """The paths of a sweep started in this working folder; a relative output becomes absolute."""
    remote = "://" in sweep.output
    output = sweep.output.rstrip("/") if remote else str(Path(sweep.output).resolve())
    node_dir = str(Path(sweep.node_dir).resolve())
    return SweepPaths(sweep_id, output, sweep.endpoint_url, node_dir, os.getcwd(), parent_run_id)


def run_config(trial: Trial, paths: SweepPaths) -> dict[str, Any]:
    """The trial's config.json, with its output, checkpoint store, MLflow parent and the machine's caches set."""
    tree = dump(trial.config)
    tree["output"] = str(paths.run(trial.name))
    keep = {key: tree["checkpoint"][key] for key in ("keep_last", "keep_every_nimg")}
    url = paths.url(trial.name) if paths.remote else None
    tree["checkpoint"] = {"url": url, "endpoint_url": paths.endpoint_url if url else None, **keep}
    tracking = {"parent_run_id": paths.parent_run_id, "run_name": trial.name, "log_model": False}
    tree["tracking"] |= tracking | {"registered_model": None, "prometheus_port": None}  # one port, many trials
    if tree["data"]["cache_dir"] is None and "://" in tree["data"]["manifest"]:
        tree["data"]["cache_dir"] = f"{paths.node_dir}/data"
    if tree["eval"]["cache_dir"] is None:
        tree["eval"]["cache_dir"] = paths.node_dir
    return tree


def command(config: Path, resources: TrialConfig, node_rank: int, address: str, port: int) -> list[str]:
    """The training command of one machine: plain python for one process, else torchrun."""
    train = ["-m", "launch.train", "--config", str(config)]
    if resources.processes == 1:
        return [sys.executable, *train]
    torchrun = [sys.executable, "-m", "warm_dist.distributed.torchrun"]
    torchrun += [f"--nnodes={resources.nodes}", f"--nproc-per-node={resources.processes_per_node}"]
    torchrun += [f"--node-rank={node_rank}", f"--master-addr={address}", f"--master-port={port}"]
    return torchrun + train


def environment(resources: TrialConfig) -> dict[str, str]:
    """This process's environment with the trial's thread count, without GPUs if it has none, without Ray's token."""
    ours = {"OMP_NUM_THREADS": str(resources.cpus_per_process)}
    if not resources.gpus_per_process:
        ours |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**{key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}, **ours}


def start_node(
    config: dict[str, Any], paths: SweepPaths, resources: TrialConfig, rank: int, address: str, port: int
) -> Any:
    """Start one machine's share of a trial under a supervisor that ends it with this process. Raises OutputError."""
    run = Path(config["output"])
    make_folder(run)
    stem = f"trial_{rank}" if rank else "trial"  # machines may share the folder
    path, log = run / f"{stem}.json", run / f"{stem}.log"
    write_json(path, config)
    cwd = paths.cwd if Path(paths.cwd).is_dir() else None
    return supervisor.start(command(path, resources, rank, address, port), environment(resources), log, cwd)


def patiently(action: Callable[[], None], patience_s: float = PATIENCE_S) -> None:
    """Call `action`, retrying while the store is unreachable. Raises UnreachableError after patience_s seconds."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return action()
        except UnreachableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


@dataclass(frozen=True)
class End:
    """How a trial's process ended. final: a retry would end the same way."""

    code: int
    reason: str
    final: bool


class Reported(Record):
    """The content of a trial's reported.json. nimg: of the last evaluation that the driver `session` knows."""

    session: str
    nimg: int


class TrialRun:
    """A trial on its first machine: starts it, follows its metrics.jsonl, ends it.

    session: id of the sweep's driver. Evaluations are reported once per driver, by rising nimg, also after a crash.
    """

    def __init__(self, trial: Trial, paths: SweepPaths, resources: TrialConfig, session: str) -> None:
        self.trial, self.resources, self.paths, self.session = trial, resources, paths, session
        self.run, self.config = paths.run(trial.name), run_config(trial, paths)
        self.store: Store = open_store(paths.url(trial.name), paths.endpoint_url if paths.remote else None)
        self.total_nimg = trial.config.train.total_nimg
        self._process: subprocess.Popen[bytes] | None = None
        self._size, self._records = -1, list[dict[str, Any]]()
        self._sent: dict[str, tuple[int, int]] = {}
        make_folder(self.run)
        self._reported = self._last_reported()

    def start(self, address: str = LOOPBACK, port: int | None = None) -> None:
        """Start the first machine's share. Raises UnreachableError if an earlier sweep's process still holds the run."""
        try:
            locked(self.run / LOCK, FREE_S).close()
        except BlockingIOError:
            raise UnreachableError(f"{self.run}: another process still trains in it") from None
        self._begun = time.time()
        port = port or free_port(address)
        self._process = start_node(self.config, self.paths, self.resources, 0, address, port)

    def end(self) -> End | None:
        """How the process ended, or None while it runs."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return None
        end = read_end(self.run, since=self._begun)
        if end:
            return End(end.code, end.reason, end.code in _FINAL_CODES)
        reason = f"ended with code {code} and no exit.json: {self._last_line()}"
        return End(code or errors.EXIT_UNEXPECTED, reason, final=False)

    def _last_line(self) -> str:
        with suppress(OSError):
            lines = (self.run / "trial.log").read_text(errors="replace").strip().splitlines()
            return lines[-1].strip()[:300] if lines else "trial.log is empty"
        return "trial.log cannot be read"

    def evaluations(self, finished: bool) -> Iterator[dict[str, Any]]:
        """The evaluations not yet reported. The last, at total_nimg, waits until the run has finished and is complete."""
        for record in self._read():
            if record["kind"] == "eval" and record["nimg"] > self._reported:
                if record["nimg"] >= self.total_nimg and not finished:
                    return
                yield record

    def nimg(self) -> int:
        """Images trained on, by the run's metrics."""
        return int(max((record["nimg"] for record in self._read()), default=0))

    def _read(self) -> list[dict[str, Any]]:
        path = self.run / METRICS
        with suppress(OSError, OutputError):
            size = path.stat().st_size
            if size != self._size:
                self._records, self._size = read_metrics(path), size
        return self._records

    def _last_reported(self) -> int:
        with suppress(WarmDistError, DamagedError):
            reported = unseal(self.store.read("reported.json"), Reported)
            return reported.nimg if reported.session == self.session else -1
        return -1

    def report(self, nimg: int) -> None:
        """Publish the run's files, then store that the evaluation at nimg was reported.

        Only the last report waits for a store that does not answer; earlier ones are sent with the next report.
        """
        self._reported = nimg

        def send() -> None:
            self.publish()
            self.store.write("reported.json", seal({"session": self.session, "nimg": nimg}))

        if nimg >= self.total_nimg:
            patiently(send)
        else:
            with suppress(UnreachableError):
                send()

    def publish(self) -> None:
        """Upload the run's changed small files and weights to an S3 output."""
        if not self.paths.remote:
            return
        for path in sorted(path for pattern in _PUBLISHED for path in self.run.glob(pattern)):
            stat = path.stat()
            name, version = path.relative_to(self.run).as_posix(), (stat.st_size, stat.st_mtime_ns)
            if self._sent.get(name) != version:
                if name.startswith("weights/"):
                    self.store.upload(name, path)
                else:
                    self.store.write(name, path.read_bytes())  # read at once, since the file may grow
                self._sent[name] = version

    def close(self) -> None:
        """End the process and its children: SIGTERM to let it save, SIGKILL after 10 s. Then publish."""
        if self._process is not None:
            supervisor.stop(self._process, END_S)
            self._write_missing_end()
        with suppress(UnreachableError):  # the files then stay on this machine
            self.publish()
            if self.paths.remote:
                shutil.rmtree(self.run, ignore_errors=True)  # everything needed is on S3

    def _write_missing_end(self) -> None:
        """Write exit.json for a process that was killed before it could."""
        attempt = attempt_of(self.run)
        if attempt and not (self.run / EXIT).exists():
            write_end(self.run, attempt, self.nimg(), Stopped("ended by the sweep before it could save"))
