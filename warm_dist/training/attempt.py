"""One attempt at a run: joins the ranks, wires the data to the trainer, and ends in exit.json."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

from warm_dist import errors
from warm_dist.config.run import Config

STOP_UPLOAD_S = 15  # what an ending run spends on sending its last checkpoint: launchers kill after 30 s


class Attempt:
    """One attempt at a run: joins the processes, wires data to trainer, and leaves exit.json at every end but kill -9."""

    def __init__(self, config: Config) -> None:
        from warm_dist.distributed.heartbeat import Heartbeat
        from warm_dist.distributed.stop import StopSignal
        from warm_dist.distributed.world import join, set_threads

        self.config, self.path, parallel = config, Path(config.output), config.parallel
        self.stop = StopSignal().install()
        set_threads()
        try:
            self.world = join(parallel.timeout_s)
        except errors.UnreachableError as error:
            if os.environ.get("LOCAL_RANK") == "0" != os.environ.get("RANK"):
                errors.print_error(error)  # rank 0 tells its own machine only
            raise
        self.heartbeat = Heartbeat(self.world, self.path, parallel.timeout_s, self.stop, parallel.preemption_file)
        self.number, self.nimg = 0, 0
        self._mirror: subprocess.Popen[bytes] | None = None

    def say(self, text: str) -> None:
        if self.world.is_main:
            with contextlib.suppress(OSError):  # whoever read our output is gone; the run goes on
                print(text, flush=True)

    def run(self) -> None:
        from warm_dist.distributed.collectives import PeerLost, is_peer_loss, on_main
        from warm_dist.distributed.world import shutdown
        from warm_dist.runs.folder import write_end

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
                        raise  # our own fault (a bug, no memory left) keeps its traceback and is not called resumable
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
        from warm_dist.runs.folder import claim_run

        number, self._lock = claim_run(self.path)
        return number

    def _peer_error(self, error: Exception) -> errors.WarmDistError:
        """A broken collective is usually a peer's end: the peer has written why, or its silence tells who it was."""
        from warm_dist.files import read_json

        def told() -> errors.PeerError | None:
            end = read_json(self.path / "exit.json")
            if end and end["attempt"] == self.number:
                return errors.PeerError(end["reason"], end["code"], end["resumable"])
            return self.heartbeat.peers_end()

        message = self.heartbeat.diagnose(error, lambda: told() is not None)
        found = told() or errors.UnreachableError(message)
        if self.world.rank and self.heartbeat.speaks():
            errors.print_error(found)  # rank 0, which tells people everything else, is not there to do so
        return found

    def _train(self) -> None:
        from data_pipelines.reading.loader import open_loader
        from warm_dist.checkpoints.manager import CheckpointManager
        from warm_dist.distributed.collectives import on_main
        from warm_dist.evaluation.evaluator import Evaluator
        from warm_dist.runs.metrics import MetricsLog, read_metrics
        from warm_dist.store.open import open_store
        from warm_dist.tracking.prometheus import Exporter
        from warm_dist.training.trainer import Trainer

        config, world, port = self.config, self.world, self.config.tracking.prometheus_port
        with contextlib.closing(open_loader(config, world.rank, world.size)) as loader:
            info = loader.manifest.info
            self._describe_reader(loader)
            storage = CheckpointManager(self.path, world, open_store, config.checkpoint, self.say)
            self.number = max(self.number, storage.attempts() + 1)  # on a new machine it is not the first
            trainer = Trainer(config, world, info, self.say, storage, self.heartbeat)
            late_s = float(STOP_UPLOAD_S)
            try:
                trainer.restore()
                self.nimg = trainer.nimg
                self._describe_run(trainer, info.fingerprint)
                log = None
                if world.is_main:
                    exporter = Exporter(config.tracking.prometheus_host, port) if port else None
                    if exporter:
                        exporter.follow("heartbeat_age_s", "longest silence of a rank", self.heartbeat.silence_s)
                        exporter.follow("checkpoint_age_s", "since the last safe checkpoint", trainer.unsafe_s)
                    log = MetricsLog(self.path / "metrics.jsonl", self.number, exporter)
                    log.begin()
                self._start_mirror()
                evaluator = None
                if config.eval:
                    evaluator = Evaluator(config, world, info, loader.read, self.path, self.say, open_store)
                done = {r["nimg"] for r in read_metrics(self.path / "metrics.jsonl") if r["kind"] == "eval"}
                done = on_main(world, lambda: done)
                trainer.fit(loader.batches(trainer.nimg), log, self.stop, evaluator, done)
                late_s = float(config.parallel.timeout_s)
            finally:
                self.nimg = trainer.nimg
                if self._mirror is not None and self._mirror.poll() is not None:
                    self.say(
                        f"the MLflow mirror has ended, see mirror.log; python launch/mirror.py {self.path} catches up"
                    )
                late = storage.close(late_s)
                trainer.report_uploads()
                for upload in late:
                    self.say(
                        f"{upload.name} is not at {config.checkpoint.url} yet ({upload.error}); the same command sends it"
                    )
            self.say(f"reader: at most {loader.peak_bytes / 1e6:.1f} MB were held")
            self._finish(storage, late)

    def _describe_reader(self, loader: Any) -> None:
        self.say(
            f"reader: {loader.threads} threads, at most {loader.most_bytes / 1e6:.0f} MB a rank, "
            f"{len(loader.manifest.shards):,} shards checked"
        )
        if loader.pieces > 1:
            self.say(
                f"reader: a window comes in {loader.pieces} pieces, and a chunk is fetched up to as often; "
                f"data.buffer_bytes={loader.whole_bytes} would hold it whole"
            )

    def _describe_run(self, trainer: Any, fingerprint: str) -> None:
        from warm_dist.networks.unet import num_parameters
        from warm_dist.runs.folder import describe_run

        if self.world.is_main:
            facts = {
                "fingerprint": fingerprint,
                "world_size": self.world.size,
                "zero_stage": self.config.parallel.zero_stage if self.config.engine == "deepspeed" else 0,
                "num_parameters": num_parameters(trainer.engine.module),
                "device": str(self.world.device),
            }
            describe_run(self.path, self.config, self.number, facts)

    def _finish(self, storage: Any, late: list[Any]) -> None:
        from warm_dist.checkpoints.weights import export_weights

        if self.world.is_main and (storage.shared or not late):
            path = self.path / "weights" / "ema.safetensors"
            export_weights([(storage.saved(self.nimg), "ema", 1.0)], path)
            self.say(f"finished: {path}")
        if late:
            raise errors.UnreachableError(
                f"trained to nimg {self.nimg}, but {late[-1].name} is not at {self.config.checkpoint.url}: "
                f"{late[-1].error}; the same command sends it"
            )

    def _start_mirror(self) -> None:
        if self.world.is_main and self.config.tracking.mlflow_url:
            from warm_dist.tracking.follow import start_mirror

            try:
                self._mirror = start_mirror(self.path)
            except OSError as error:
                self.say(f"no MLflow mirror ({error.strerror}); later: python launch/mirror.py {self.path}")
