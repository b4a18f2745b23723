"""One attempt at a run: joins the ranks, wires the data to the trainer, and ends in exit.json."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from warm_dist import errors
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.checkpoints.uploads import Upload
from warm_dist.checkpoints.weights import export_weights
from warm_dist.config.run import Config
from warm_dist.data import Reader
from warm_dist.distributed.collectives import PeerLost, is_peer_loss, on_main
from warm_dist.distributed.heartbeat import Heartbeat
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import join, set_threads, shutdown
from warm_dist.evaluation.evaluator import Evaluator
from warm_dist.networks.unet import num_parameters
from warm_dist.runs.folder import METRICS, WEIGHTS, claim_run, describe_run, read_end, write_end
from warm_dist.runs.metrics import MetricsLog, read_metrics
from warm_dist.tracking.follow import start_mirror
from warm_dist.tracking.prometheus import Exporter
from warm_dist.training.trainer import Trainer

STOP_UPLOAD_S = 15.0  # what an ending run spends on sending its last checkpoint: launchers kill after 30 s

OpenReader = Callable[[Config, int, int], Reader]
"""(config, rank, world size) → the reader of this rank's data."""


class Attempt:
    """One attempt at a run. Every end but kill -9 leaves exit.json.

    Raises, on every rank, what ended the run: Stopped after a save, PeerError or UnreachableError for a lost rank, and
    what the reader, the trainer and its parts raise.
    """

    def __init__(self, config: Config, open_reader: OpenReader) -> None:
        self.config, self.path, self.open_reader = config, Path(config.output), open_reader
        parallel = config.parallel
        self.stop = StopSignal().install()
        set_threads()
        try:
            self.world = join(parallel.timeout_s)
        except errors.UnreachableError as error:
            if os.environ.get("LOCAL_RANK") == "0" != os.environ.get("RANK"):
                errors.print_error(error)  # rank 0 speaks for its own machine only
            raise
        self.heartbeat = Heartbeat(self.world, self.path, parallel.timeout_s, self.stop, parallel.preemption_file)
        self.number, self.nimg = 0, 0
        self._mirror: subprocess.Popen[bytes] | None = None

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self.world.is_main:
            with contextlib.suppress(OSError):  # nobody reads our output any more; the run goes on
                print(text, flush=True)

    def run(self) -> None:
        """Train to the end of the run."""
        failure: BaseException | None = None
        try:
            self.number = on_main(self.world, self._claim, "claim")
            with self.heartbeat:
                try:
                    self._train()
                except errors.Stopped:  # on every rank, after the save
                    reason = self.stop.reason(self.world)
                    raise errors.Stopped(f"{reason} at nimg {self.nimg}; run the same command again to go on") from None
                except (RuntimeError, PeerLost) as error:
                    if self.world.size == 1 or not is_peer_loss(error):
                        raise  # our own fault (a bug, no memory left) keeps its traceback and is not resumable
                    raise self._peer_error(error) from error
        except BaseException as error:
            failure = error
            raise
        finally:
            if self.number and (failure is not None or self.world.is_main):
                write_end(self.path, self.number, self.nimg, failure)
            if failure is None:
                shutdown()

    def _claim(self) -> int:
        number, self._lock = claim_run(self.path)
        return number

    def _peer_error(self, error: Exception) -> errors.WarmDistError:
        """The reason for a broken collective: a peer has written why it ended, or its silence tells which one it was."""

        def told() -> errors.PeerError | None:
            end = read_end(self.path, attempt=self.number)
            if end:
                return errors.PeerError(end["reason"], end["code"], end["resumable"])
            return self.heartbeat.peers_end()

        message = self.heartbeat.diagnose(error, lambda: told() is not None)
        found = told() or errors.UnreachableError(message)
        if self.world.rank and self.heartbeat.speaks():
            errors.print_error(found)  # rank 0, which prints everything else, is gone
        return found

    def _train(self) -> None:
        config, world = self.config, self.world
        with contextlib.closing(self.open_reader(config, world.rank, world.size)) as reader:
            for line in reader.describe():
                self.say(line)
            checkpoints = CheckpointManager(self.path, world, config.checkpoint, self.say)
            self.number = max(self.number, checkpoints.attempts() + 1)  # on a new machine it is not the first
            trainer = Trainer(config, world, reader.info, self.say, checkpoints, self.heartbeat)
            patience_s = STOP_UPLOAD_S
            try:
                trainer.restore()
                self.nimg = trainer.nimg
                self._fit(trainer, reader)
                patience_s = float(config.parallel.timeout_s)
            finally:
                self.nimg = trainer.nimg
                late = self._close(trainer, checkpoints, patience_s)
            self.say(f"reader: at most {reader.peak_bytes / 1e6:.1f} MB were held")
            self._finish(checkpoints, late)

    def _fit(self, trainer: Trainer, reader: Reader) -> None:
        config, world = self.config, self.world
        if world.is_main:
            self._describe_run(trainer, reader.info.fingerprint)
        log = self._open_log(trainer) if world.is_main else None
        self._start_mirror()
        evaluator = Evaluator(config, world, reader.info, reader.read, self.path, self.say) if config.eval else None
        done = {record["nimg"] for record in read_metrics(self.path / METRICS) if record["kind"] == "eval"}
        done = on_main(world, lambda: done)
        trainer.fit(reader.batches(trainer.nimg), log, self.stop, evaluator, done)

    def _describe_run(self, trainer: Trainer, fingerprint: str) -> None:
        facts = {
            "fingerprint": fingerprint,
            "world_size": self.world.size,
            "zero_stage": self.config.parallel.zero_stage if self.config.engine == "deepspeed" else 0,
            "num_parameters": num_parameters(trainer.engine.module),
            "device": str(self.world.device),
        }
        describe_run(self.path, self.config, self.number, facts)

    def _open_log(self, trainer: Trainer) -> MetricsLog:
        exporter, tracking = None, self.config.tracking
        if tracking.prometheus_port:
            exporter = Exporter(tracking.prometheus_host, tracking.prometheus_port)
            exporter.follow("heartbeat_age_s", "longest silence of a rank", self.heartbeat.silence_s)
            exporter.follow("checkpoint_age_s", "since the last safe checkpoint", trainer.unsafe_s)
        log = MetricsLog(self.path / METRICS, self.number, exporter)
        log.begin()
        return log

    def _start_mirror(self) -> None:
        if self.world.is_main and self.config.tracking.mlflow_url:
            try:
                self._mirror = start_mirror(self.path)
            except OSError as error:
                self.say(f"no MLflow mirror ({error.strerror}); later: python launch/mirror.py {self.path}")

    def _close(self, trainer: Trainer, checkpoints: CheckpointManager, patience_s: float) -> list[Upload]:
        """Wait for uploads; returns those that have not arrived."""
        if self._mirror is not None and self._mirror.poll() is not None:
            self.say(f"the MLflow mirror has ended, see mirror.log; python launch/mirror.py {self.path} catches up")
        late = checkpoints.close(patience_s)
        trainer.report_uploads()
        url = self.config.checkpoint.url
        for upload in late:
            self.say(f"{upload.name} is not at {url} yet ({upload.error}); the same command sends it")
        return late

    def _finish(self, checkpoints: CheckpointManager, late: list[Upload]) -> None:
        if self.world.is_main and (checkpoints.shared or not late):
            path = self.path / WEIGHTS
            export_weights([(checkpoints.saved(self.nimg), "ema", 1.0)], path)
            self.say(f"finished: {path}")
        if late:
            raise errors.UnreachableError(
                f"trained to nimg {self.nimg}, but {late[-1].name} is not at {self.config.checkpoint.url}: "
                f"{late[-1].error}; the same command sends it"
            )
