"""One attempt at a run: joins the ranks, connects the data to the trainer, and ends with exit.json."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from warm_dist import errors
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.checkpoints.uploads import Upload
from warm_dist.checkpoints.weights import export_weights
from warm_dist.config.run import Config
from warm_dist.data import Reader
from warm_dist.distributed.collectives import PeerLost, is_peer_loss, on_main
from warm_dist.distributed.heartbeat import Heartbeat
from warm_dist.distributed.stop import PATIENCE_S, StoppedAtOnce, StopSignal
from warm_dist.distributed.world import join, prepare_host, shutdown
from warm_dist.evaluation.evaluator import Evaluator
from warm_dist.networks.unet import num_parameters
from warm_dist.runs.folder import LOCK, METRICS, WEIGHTS, Claim, describe_run, read_end
from warm_dist.runs.metrics import MetricsLog, read_metrics
from warm_dist.store.lease import Lease
from warm_dist.store.open import open_store
from warm_dist.tracking.follow import start_mirror
from warm_dist.tracking.prometheus import Exporter
from warm_dist.training.trainer import Evaluate, Trainer

STOP_UPLOAD_S = 15.0  # how long a stopping run waits for its last upload: launchers kill after 30 s

OpenReader = Callable[[Config, int, int], Reader]
"""(config, rank, world size) → this rank's reader."""


class Attempt:
    """One attempt at a run. However it ends, except by kill -9, it leaves exit.json.

    Raises on every rank what ended the run: Stopped after a save, PeerError or UnreachableError for a lost rank, and
    whatever the reader, the trainer and its parts raise.
    """

    def __init__(self, config: Config, open_reader: OpenReader) -> None:
        self.config, self.path, self.open_reader = config, Path(config.output), open_reader
        parallel = config.parallel
        self.stop = StopSignal().install()
        prepare_host()
        self.stop.abandon = self._never_joined
        try:
            with self.stop.at_once("waiting for its peers"):
                self.world = join(parallel.timeout_s)
        except StoppedAtOnce as error:
            self._never_joined(error)
        self.stop.abandon = self._abandon
        self.heartbeat = Heartbeat(self.world, self.path, parallel.timeout_s, self.stop, parallel.preemption_file)
        self.number, self.nimg = 0, 0
        self.claim: Claim | None = None
        self._trainer: Trainer | None = None
        self._lease: Lease | None = None
        self._mirror: subprocess.Popen[bytes] | None = None

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self.world.is_main:
            with contextlib.suppress(OSError):  # a closed stdout must not end the run
                errors.tell(text)

    def run(self) -> None:
        """Train to the end of the run."""
        failure: BaseException | None = None
        try:
            self.number = on_main(self.world, self._take, "claim")
            self.claim = self.claim or Claim(self.path)
            with self.heartbeat:
                try:
                    self._train()
                except StoppedAtOnce as error:
                    raise self._kept(error) from None
                except errors.OutputError:
                    self.claim.check()  # a folder that is gone is the cause
                    raise
                except errors.Stopped:  # on every rank, after the save
                    reason = self.stop.reason(self.world)
                    raise errors.Stopped(
                        f"{reason} at nimg {self.nimg}; run the same command again to resume"
                    ) from None
                except (RuntimeError, PeerLost) as error:
                    if self.world.size == 1 or not is_peer_loss(error):
                        raise  # an error of this rank (a bug, out of memory) keeps its traceback and is not resumable
                    raise self._peer_error(error) from error
        except BaseException as error:
            failure = error
            raise
        finally:
            self._end(failure)
            if failure is None:
                shutdown()

    def _end(self, failure: BaseException | None) -> None:
        if self.claim is not None:
            if failure is not None or self.world.is_main:
                self.claim.end(self.number, self.nimg, failure)
            self.claim.release()

    def _never_joined(self, error: StoppedAtOnce) -> NoReturn:
        Claim.end_unclaimed(self.path, error)
        errors.end(error)

    def _kept(self, error: StoppedAtOnce) -> StoppedAtOnce:
        """The error with what is saved, printed here if rank 0, which prints everything else, cannot."""
        trainer, kept = self._trainer, "there is nothing new to save"
        if trainer is not None:
            self.nimg, saved = trainer.nimg, trainer.saved_nimg
            kept = f"saved at nimg {saved}" if saved else "nothing is saved yet"
            if saved < self.nimg:
                kept = f"nimg {self.nimg} is not saved, " + (
                    f"nimg {saved} is" if saved else "nor is anything before it"
                )
            if late := trainer.checkpoints and trainer.checkpoints.pending():
                kept += f", {', '.join(late)} not yet at {self.config.checkpoint.url}"
        full = StoppedAtOnce(error.what, kept)
        if self.world.rank and self.heartbeat.speaks():
            errors.print_error(full)
        return full

    def _abandon(self, error: StoppedAtOnce) -> None:
        """End the process in place of the main thread, which waits inside torch."""
        full = self._kept(error)
        self._end(full)
        errors.end(full)

    def _take(self) -> int:
        self.claim = Claim.take(self.path)
        return self.claim.attempt

    def _take_url(self, stack: contextlib.ExitStack) -> None:
        """Hold checkpoint.url until the run ends, so that no other run replaces its checkpoints."""
        checkpoint = self.config.checkpoint
        if checkpoint.url:
            store = open_store(checkpoint.url, checkpoint.endpoint_url)
            with contextlib.suppress(errors.MissingError):
                store.stat(LOCK)  # a trial's folder on S3 has all that its run wrote, but nobody trained in it
                raise errors.ConfigError(
                    f"checkpoint.url {checkpoint.url}: is the folder of a run; name one for this run's checkpoints alone"
                )
            self._lease = stack.enter_context(Lease(store, "owner.json", f"run {self.path.absolute()}"))

    def _check(self) -> None:
        """Raise OutputError if the folder or checkpoint.url is no longer this run's. Rank 0 only."""
        assert self.claim is not None
        self.claim.check()
        if self._lease is not None:
            self._lease.check()

    def _peer_error(self, error: Exception) -> errors.WarmDistError:
        """Why a collective failed: the error that a peer has reported, or a diagnosis from the heartbeats."""

        def reported() -> errors.PeerError | None:
            end = read_end(self.path, attempt=self.number)
            if end:
                return errors.PeerError(end.reason, end.code, end.resumable)
            return self.heartbeat.peers_end()

        message = self.heartbeat.diagnose(error, lambda: reported() is not None)
        found = reported() or errors.UnreachableError(message)
        if self.world.rank and self.heartbeat.speaks():
            errors.print_error(found)  # rank 0, which prints everything else, is lost
        return found

    def _train(self) -> None:
        config, world = self.config, self.world
        with contextlib.ExitStack() as stack:
            with self.stop.at_once("opening the data"):
                on_main(world, lambda: self._take_url(stack), "checkpoint.url")
                reader = stack.enter_context(contextlib.closing(self.open_reader(config, world.rank, world.size)))
            for line in reader.describe():
                self.say(line)
            with self.stop.at_once("looking for a checkpoint", PATIENCE_S):  # in time, all ranks stop together
                checkpoints = CheckpointManager(self.path, world, config.checkpoint, self.say, self._check)
                self.number = max(self.number, checkpoints.attempts() + 1)  # a new machine may not have the first
                trainer = Trainer(config, world, reader.info, self.say, checkpoints, self.heartbeat)
            patience_s = STOP_UPLOAD_S
            try:
                with self.stop.at_once("looking for a checkpoint", PATIENCE_S):  # in time, all ranks stop together
                    trainer.restore()
                self.nimg, self._trainer = trainer.nimg, trainer
                with self.stop.at_once("preparing the evaluation"):
                    begun = self._begin(trainer, reader)
                self.stop.hindrance = self.heartbeat.hindrance
                trainer.fit(reader.batches(trainer.nimg), *begun)
                if self.stop.name is None:
                    patience_s = float(config.parallel.timeout_s)
            except StoppedAtOnce:
                patience_s = 1.0  # a server or peer does not answer
                raise
            finally:
                self.stop.hindrance = lambda: None
                self.nimg = trainer.nimg
                late = self._close(trainer, checkpoints, patience_s)
            self.say(f"reader: peak memory {reader.peak_bytes / 1e6:.1f} MB")
            with self._unless_stopping("exporting the weights"):
                self._finish(checkpoints, late)

    def _begin(
        self, trainer: Trainer, reader: Reader
    ) -> tuple[MetricsLog | None, StopSignal, Evaluate | None, set[int]]:
        """Describe the run and start its log and mirror; returns what `Trainer.fit` takes after the batches."""
        config, world = self.config, self.world
        log = None
        if world.is_main:
            facts = {
                "fingerprint": reader.info.fingerprint,
                "world_size": world.size,
                "zero_stage": config.parallel.zero_stage if config.engine == "deepspeed" else 0,
                "num_parameters": num_parameters(trainer.engine.module),
                "device": str(world.device),
            }
            describe_run(self.path, config, self.number, facts)
            log = self._open_log(trainer)
            self._start_mirror()
        evaluator = Evaluator(config, world, reader.info, reader.read, self.path, self.say) if config.eval else None
        done = {record["nimg"] for record in read_metrics(self.path / METRICS) if record["kind"] == "eval"}
        return log, self.stop, evaluator, on_main(world, lambda: done)

    def _unless_stopping(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """A stop ends what is inside, unless it came before: then its time is limited."""
        return self.stop.at_once(doing) if self.stop.name is None else contextlib.nullcontext()

    def _open_log(self, trainer: Trainer) -> MetricsLog:
        exporter, tracking = None, self.config.tracking
        if tracking.prometheus_port:
            exporter = Exporter(tracking.prometheus_host, tracking.prometheus_port)
            exporter.follow("heartbeat_age_s", "longest silence of a rank", self.heartbeat.silence_s)
            exporter.follow("checkpoint_age_s", "since the last safe checkpoint", trainer.unsafe_s)
        log = MetricsLog(self.path / METRICS, self.number, exporter, self._check)
        log.begin()
        return log

    def _start_mirror(self) -> None:
        if self.config.tracking.mlflow_url:
            try:
                self._mirror = start_mirror(self.path)
            except OSError as error:
                self.say(f"no MLflow mirror ({error.strerror}); later: python launch/mirror.py {self.path}")

    def _close(self, trainer: Trainer, checkpoints: CheckpointManager, patience_s: float) -> list[Upload]:
        """Wait for uploads; returns those that failed or have not finished."""
        if self._mirror is not None and self._mirror.poll() is not None:
            self.say(f"the MLflow mirror has ended, see mirror.log; python launch/mirror.py {self.path} catches up")
        with self._unless_stopping("sending the last checkpoint"):
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
