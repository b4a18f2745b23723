"""A trial of a sweep as what it is: the training command in a process group of its own, and the files that it writes.

Nothing here knows Ray. A sweep's output is a folder that all machines see, and a run lies in it; or it is on S3: a run
then lies in a local folder of its machine, its checkpoints go to S3 by checkpoint.url, its small files by `publish`.
"""

from __future__ import annotations

import json
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
from warm_dist.errors import Stopped, UnreachableError, WarmDistError
from warm_dist.files import locked, make_folder, read_json, write_json
from warm_dist.runs.folder import CONFIG, EXIT, LOCK, METRICS, MIRROR, RUN, read_end, write_end
from warm_dist.runs.metrics import read_metrics
from warm_dist.store.base import Store
from warm_dist.store.open import open_store
from warm_dist.supervisor import free_port
from warm_dist.sweeps.trials import Trial

END_S = 10.0  # from SIGTERM to SIGKILL: time to save a checkpoint, or not
FREE_S = 20.0  # what a killed sweep's processes may take to be gone from a run's folder
PATIENCE_S, RETRY_S = 600.0, 5.0  # with an output on S3 that does not answer
LOOPBACK = "127.0.0.1"
# Tried again it would fail again: the config, the data, a damaged checkpoint, non-finite numbers, the number of processes.
_FINAL_CODES = {2, 3, 4, 5, 9}
_PUBLISHED = (CONFIG, RUN, METRICS, MIRROR, EXIT, "trial.log", "samples/*.png", "weights/*.safetensors")


@dataclass(frozen=True)
class SweepPaths:
    """Where a sweep's trials lie, as far as a machine can tell that has its config. cwd: what relative paths start from."""

    sweep_id: str
    output: str
    endpoint_url: str | None
    node_dir: str
    cwd: str
    parent_run_id: str | None

    @property
    def remote(self) -> bool:
        """Is the output on S3?"""
        return "://" in self.output

    def url(self, name: str) -> str:
        """Of a trial's folder in the output."""
        return f"{self.output}/trials/{name}"

    def run(self, name: str) -> Path:
        """A trial's run folder on this machine."""
        return Path(self.node_dir) / self.sweep_id / name if self.remote else Path(self.url(name))


def make_paths(sweep: SweepConfig, sweep_id: str, parent_run_id: str | None) -> SweepPaths:
    """Of a sweep that starts in this process's working folder. A relative output is absolute from then on."""
    remote = "://" in sweep.output
    output = sweep.output.rstrip("/") if remote else str(Path(sweep.output).expanduser().resolve())
    node_dir = str(Path(sweep.node_dir).expanduser().resolve())
    return SweepPaths(sweep_id, output, sweep.endpoint_url, node_dir, os.getcwd(), parent_run_id)


def run_config(trial: Trial, place: SweepPaths) -> dict[str, Any]:
    """The trial's config.json: its own output, its checkpoints' store, its parent in MLflow, the machine's caches."""
    tree = dump(trial.config)
    tree["output"] = str(place.run(trial.name))
    keep = {key: tree["checkpoint"][key] for key in ("keep_last", "keep_every_nimg")}
    url = place.url(trial.name) if place.remote else None
    tree["checkpoint"] = {"url": url, "endpoint_url": place.endpoint_url if url else None, **keep}
    tracking = {"parent_run_id": place.parent_run_id, "run_name": trial.name, "log_model": False}
    tree["tracking"] |= tracking | {"registered_model": None, "prometheus_port": None}  # one port, many trials
    if tree["data"]["cache_dir"] is None and "://" in tree["data"]["manifest"]:
        tree["data"]["cache_dir"] = f"{place.node_dir}/data"
    if tree["eval"]["cache_dir"] is None:
        tree["eval"]["cache_dir"] = place.node_dir
    return tree


def command(config: Path, resources: TrialConfig, node_rank: int, address: str, port: int) -> list[str]:
    """The training command of one machine: plain python for one process, else torchrun. The module is found anywhere."""
    train = ["launch.train", "--config", str(config)]
    if resources.processes == 1:
        return [sys.executable, "-m", *train]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={resources.nodes}", f"--nproc-per-node={resources.processes_per_node}"),
        *(f"--node-rank={node_rank}", f"--master-addr={address}", f"--master-port={port}", "-m", *train),
    ]


def environment(resources: TrialConfig) -> dict[str, str]:
    """Ours, with as many threads as CPUs were asked for, no GPU where none was, and without Ray's token."""
    ours = {"OMP_NUM_THREADS": str(resources.cpus_per_process)}
    if not resources.gpus_per_process:
        ours |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**{key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}, **ours}


def start_node(
    config: dict[str, Any], place: SweepPaths, resources: TrialConfig, rank: int, address: str, port: int
) -> Any:
    """Start one machine's share of a trial, supervised: it ends when this process does. Raises OutputError."""
    run = Path(config["output"])
    make_folder(run)
    path = run / (f"trial_{rank}.json" if rank else "trial.json")  # machines may share the folder, or not
    write_json(path, config)
    cwd = place.cwd if Path(place.cwd).is_dir() else None
    log = run / (f"trial_{rank}.log" if rank else "trial.log")
    return supervisor.start(command(path, resources, rank, address, port), environment(resources), log, cwd)


def patiently(action: Callable[[], None], patience_s: float = PATIENCE_S) -> None:
    """Do what speaks to a store, again while that does not answer. Raises UnreachableError after patience_s."""
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
    """How a trial's process ended. final: the same command would end the same way."""

    code: int
    reason: str
    final: bool


class TrialRun:
    """The trial on its first machine: started, followed by its metrics.jsonl, ended.

    session: of the sweep's driver. What was reported to an earlier driver is reported again, to this one only once,
    also after a crash: by rising nimg.
    """

    def __init__(self, trial: Trial, place: SweepPaths, resources: TrialConfig, session: str) -> None:
        self.trial, self.resources, self.place, self.session = trial, resources, place, session
        self.run, self.config = place.run(trial.name), run_config(trial, place)
        self.store: Store = open_store(place.url(trial.name), place.endpoint_url if place.remote else None)
        self.total_nimg = trial.config.train.total_nimg
        self._process: subprocess.Popen[bytes] | None = None
        self._size, self._records = -1, list[dict[str, Any]]()
        self._sent: dict[str, tuple[int, int]] = {}
        make_folder(self.run)
        self._reported = self._last_reported()

    def start(self, address: str = LOOPBACK, port: int | None = None) -> None:
        """Start the first machine's share. Raises UnreachableError if an earlier sweep's process still holds the run."""
        self._wait_until_free()
        self._begun = time.time()
        port = port or free_port(address)
        self._process = start_node(self.config, self.place, self.resources, 0, address, port)

    def _wait_until_free(self) -> None:
        try:
            locked(self.run / LOCK, FREE_S).close()
        except BlockingIOError:
            raise UnreachableError(f"{self.run}: another process still trains in it") from None

    def end(self) -> End | None:
        """None while the process lives."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return None
        told = read_end(self.run, since=self._begun)
        if told:
            return End(told["code"], str(told["reason"]), told["code"] in _FINAL_CODES)
        return End(
            code or errors.EXIT_UNEXPECTED, f"ended with code {code} and no exit.json: {self._last_words()}", False
        )

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = (self.run / "trial.log").read_text(errors="replace").strip().splitlines()
            return lines[-1].strip()[:300] if lines else "it said nothing"
        return "trial.log cannot be read"

    def evaluations(self, finished: bool) -> Iterator[dict[str, Any]]:
        """Those that were not reported yet. The last one, at total_nimg, waits until the run has finished: all is in place then."""
        for record in self._read():
            if record["kind"] == "eval" and record["nimg"] > self._reported:
                if record["nimg"] >= self.total_nimg and not finished:
                    return
                yield record

    def nimg(self) -> int:
        """How far it is, as far as its metrics tell."""
        return int(max((record["nimg"] for record in self._read()), default=0))

    def _read(self) -> list[dict[str, Any]]:
        path = self.run / METRICS
        with suppress(OSError):
            size = path.stat().st_size
            if size != self._size:
                self._records, self._size = read_metrics(path), size
        return self._records

    def _last_reported(self) -> int:
        with suppress(WarmDistError, ValueError):
            told = json.loads(self.store.read("reported.json"))
            return int(told["nimg"]) if told["session"] == self.session else -1
        return -1

    def report(self, nimg: int) -> None:
        """Remember that the evaluation at nimg was reported; first all that it tells of goes to the output.

        A store that does not answer is waited for only when the run is at its end: before, the next report sends it too.
        """
        self._reported = nimg
        told = json.dumps({"session": self.session, "nimg": nimg}).encode()

        def send() -> None:
            self.publish()
            self.store.write("reported.json", told)

        if nimg >= self.total_nimg:
            patiently(send)
        else:
            with suppress(UnreachableError):
                send()

    def publish(self) -> None:
        """Send the run's small files and weights to an output on S3, those that have changed."""
        if not self.place.remote:
            return
        for path in sorted(path for pattern in _PUBLISHED for path in self.run.glob(pattern)):
            stat = path.stat()
            name, version = path.relative_to(self.run).as_posix(), (stat.st_size, stat.st_mtime_ns)
            if self._sent.get(name) != version:
                if name.startswith("weights/"):
                    self.store.upload(name, path)
                else:
                    self.store.write(name, path.read_bytes())  # small, and it may grow meanwhile
                self._sent[name] = version

    def close(self) -> None:
        """End the process and all that it started: SIGTERM, so that it may save, and SIGKILL after 10 s."""
        if self._process is not None:
            supervisor.stop(self._process, END_S)
            self._tell_end()
        with suppress(UnreachableError):  # then it stays on this machine
            self.publish()
            if self.place.remote:
                shutil.rmtree(self.run, ignore_errors=True)  # all that anybody needs of it is on S3

    def _tell_end(self) -> None:
        """A process that was killed before it could say so has ended, for MLflow and everybody else."""
        described = read_json(self.run / RUN)
        if described and not (self.run / EXIT).exists():
            stopped = Stopped("ended by the sweep before it could save")
            write_end(self.run, described["attempt"], self.nimg(), stopped)
