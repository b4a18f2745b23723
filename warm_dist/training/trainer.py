"""The training loop: from any nimg to the end, bit-equal whether or not it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from warm_dist import rng
from warm_dist.checkpoints.format import CHECKPOINTS, SNAPSHOTS, Saved, nimg_of
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.config.batch import micro_batches
from warm_dist.config.identity import first_difference
from warm_dist.config.load import dump
from warm_dist.config.run import Config, TrainConfig
from warm_dist.data import Batch, DataInfo
from warm_dist.diffusion.heads import data_spectrum
from warm_dist.diffusion.per_frequency import loss_function
from warm_dist.diffusion.process import Level
from warm_dist.distributed.collectives import gather
from warm_dist.distributed.heartbeat import Heartbeat
from warm_dist.distributed.stop import PATIENCE_S, StoppedAtOnce, StopSignal
from warm_dist.distributed.world import World
from warm_dist.errors import CheckpointError, DataError, Stopped
from warm_dist.networks.unet import build_network
from warm_dist.runs.metrics import MetricsLog
from warm_dist.training.deepspeed_engine import build_engine
from warm_dist.training.ema import averages, kind_of
from warm_dist.training.inputs import Prefetch, Prepared, prepare
from warm_dist.training.nonfinite import NonFiniteGuard, Trace
from warm_dist.training.state import ema_tensors, load_state, state_tensors
from warm_dist.training.step_metrics import StepMetrics, progress

Evaluate = Callable[[dict[str, Tensor], int, StopSignal], dict[str, Any]]
"""(whole EMA weights by name, nimg, stop signal) → the metrics of one evaluation. A collective."""


def learning_rate(config: Config, nimg: int) -> float:
    """The learning rate at nimg: linear ramp over lr_ramp_nimg, linear decay to 0 over the last lr_decay_nimg."""
    train = config.train
    ramp = min(1.0, (nimg + train.batch_size) / train.lr_ramp_nimg) if train.lr_ramp_nimg else 1.0
    decay = min(1.0, (train.total_nimg - nimg) / train.lr_decay_nimg) if train.lr_decay_nimg else 1.0
    return train.lr * ramp * decay


def _due(every: int | None, nimg: int, train: TrainConfig) -> bool:
    """Whether what happens every so many images, and at the end, happens at nimg."""
    return nimg == train.total_nimg or (every is not None and nimg % every == 0)


class Trainer:
    """Owns the state of a run: network, optimizer, EMAs, nimg, and the step metrics.

    checkpoints: None to save nothing. heartbeat: reports the phase this rank is in.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        info: DataInfo,
        say: Callable[[str], None],
        checkpoints: CheckpointManager | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        if flaw := info.flaw():
            raise DataError(f"data.manifest {config.data.manifest}: {flaw}")
        self.config, self.world, self.info, self.say = config, world, info, say
        self.checkpoints, self.heartbeat = checkpoints, heartbeat
        network = build_network(config)
        self.shapes = {name: p.shape for name, p in network.named_parameters()}
        self.engine = build_engine(network.train(), config, world, say)
        self.emas = averages(self.engine.shard(), config.train)
        self.spectrum = data_spectrum(info, config.process.sigma_data).to(world.device)
        self.loss = loss_function(config)
        self.metrics = StepMetrics(config, world, say)
        self.guard = NonFiniteGuard(world, config.train.max_nonfinite, self._report)
        self.log: MetricsLog | None = None
        self.nimg = self.num_steps = self.saved_nimg = 0
        self._safe_since = time.monotonic()
        self.grad_norm = torch.zeros((), device=world.device)

    def restore(self) -> None:
        """Load the newest intact checkpoint, of any world size and stage, if there are any. A collective.

        Raises CheckpointError if it is another run's, or none is intact.
        """
        assert self.checkpoints is not None
        self._at("restore")
        saved = self.checkpoints.restore(
            self._check, lambda saved: load_state(saved, self.world.rank, self.engine, self.emas)
        )
        if saved is not None:
            self.nimg = self.saved_nimg = saved.meta["nimg"]
            self.num_steps = saved.meta["num_steps"]
            self.metrics.load(saved.meta["window"])
            self.say(f"resumed at nimg {self.nimg} from {saved}")

    def _check(self, saved: Saved) -> None:
        meta = saved.meta
        if meta["fingerprint"] != self.info.fingerprint:
            raise CheckpointError(
                f"{saved}: made from data {meta['fingerprint'][:12]}, this run reads {self.info.fingerprint[:12]}; "
                "point data.manifest at the former, or output at a new folder"
            )
        if difference := first_difference(meta["config"], self.config):
            name, a, b = difference
            raise CheckpointError(f"{saved}: made with {name} {a}, this run has {b}; give it a new output folder")
        if new := set(self.config.train.ema_lengths) - set(meta["config"]["train"].get("ema_lengths", ())):
            raise CheckpointError(
                f"{saved}: holds no EMA of length {min(new):g}, and none can be added during a run; remove it from "
                "train.ema_lengths, or give the run a new output folder"
            )
        if meta["nimg"] % self.config.train.batch_size:
            raise CheckpointError(f"{saved}: nimg {meta['nimg']} is not a multiple of train.batch_size")

    def save(self) -> None:
        """Write a checkpoint at nimg; the guard must have settled. A collective."""
        if self.checkpoints is None:
            return
        self._at("save")
        begun = time.monotonic()
        if self.log is not None:
            self.log.sync()  # before older checkpoints go
        meta = self._meta() | {"window": gather(self.world, self.metrics.sums.tolist())}
        size = self.checkpoints.save(CHECKPOINTS, self.nimg, state_tensors(self.engine, self.emas), meta)
        self.saved_nimg = self.nimg
        if self.config.checkpoint.url is None:
            self._safe_since = time.monotonic()
        if self.log is not None:
            self.log.write(self.nimg, "checkpoint", write_s=time.monotonic() - begun, bytes=size)

    def _snapshot(self) -> None:
        if self.checkpoints is None:
            return
        self._at("save")
        powers = {kind_of(length): self.emas[kind_of(length)] for length in self.config.train.ema_lengths}
        self.checkpoints.save(SNAPSHOTS, self.nimg, ema_tensors(powers), self._meta())

    def _meta(self) -> dict[str, Any]:
        return {
            "num_steps": self.num_steps - self.guard.skipped,
            "fingerprint": self.info.fingerprint,
            "config": dump(self.config),
            "world_size": self.world.size,
            "data": self.info.to_json(),
        }

    def step(self, data: Prepared) -> Trace:
        """One step on this rank's inputs: forward, backward, update, EMAs. No host sync."""
        train = self.config.train
        rng.seed_torch(train.seed, self.nimg, self.world.rank)
        micro, _ = micro_batches(self.config, self.world.size)
        diagnose = _due(train.log_nimg, self.nimg + train.batch_size, train)
        totals = []
        for low in range(0, len(data.x0), micro):
            self._at("forward")
            part = slice(low, low + micro)
            level = Level(data.level.sigma[part], data.level.alpha[part])
            condition = tuple(None if given is None else given[part] for given in data.condition)
            images = data.x0[part], level, data.noise[part]
            result = self.loss(self.engine, self.spectrum, *images, condition, diagnose=diagnose)
            self._at("backward")
            self.engine.backward(result.total.mean())
            totals.append(result.total.detach())
            self.metrics.add(result)
        self._at("update")
        self.grad_norm = self.engine.step(learning_rate(self.config, self.nimg))
        trace = Trace(self.nimg, data.batch.keys, data.level.sigma, totals)
        self.nimg += train.batch_size
        self.num_steps += 1
        self.metrics.num_steps += 1
        self._at("ema")
        for ema in self.emas.values():
            ema.update(self.nimg, train.batch_size)
        self._at("flags")
        return trace

    def _non_finite(self, trace: Trace) -> Tensor:
        finite = torch.isfinite(torch.cat(trace.totals)).all()
        return ~(finite & torch.isfinite(self.grad_norm)).view(1)

    def _at(self, phase: str) -> None:
        self.metrics.watch.at(phase)
        if self.heartbeat is not None:
            self.heartbeat.at(phase, self.nimg)

    def _report(self, nimg: int, text: str) -> None:
        self.say(text)
        if self.log is not None:
            self.log.write(nimg, "event", text=text)

    def fit(
        self,
        batches: Iterator[Batch],
        log: MetricsLog | None,
        stop: StopSignal,
        evaluate: Evaluate | None,
        evaluated: set[int],
    ) -> None:
        """Train to total_nimg. A collective.

        batches: this rank's, from self.nimg on. log: on rank 0. evaluated: the nimg already evaluated.
        Raises Stopped, after a save, if any rank was asked to stop, and StoppedAtOnce if a batch does not come then, with a
        save only if there is one rank; NumericsError, DataError, and what its parts raise.
        """
        self.log = log
        total = self.config.train.total_nimg
        device = self.world.device
        make = lambda: prepare(next(batches), self.config, self.info, device)  # noqa: E731
        with self._saving_alone(), Prefetch(make, device) as ahead:
            self._evaluate_if_due(stop, evaluate, evaluated)
            for _ in range(min(2, (total - self.nimg) // self.config.train.batch_size)):
                ahead.start()
            self.metrics.begin(self.nimg)
            while self.nimg < total:
                self._at("data")
                with stop.at_once(f"waiting for its batch at nimg {self.nimg}", PATIENCE_S):
                    data = ahead.take()
                if self.nimg + (len(ahead) + 2) * self.config.train.batch_size <= total:
                    ahead.start()
                trace = self.step(data)
                stopping = self.guard.check(stop.name is not None, trace, self._non_finite(trace))
                stopping = self._milestones(stop, evaluate, evaluated, stopping)
                if stopping and self.nimg < total:
                    raise Stopped(f"{stop.name or 'a peer'} at nimg {self.nimg}; run the same command again to resume")

    @contextmanager
    def _saving_alone(self) -> Iterator[None]:
        """Save after a stop that this rank heeds alone, unless others are needed for that."""
        try:
            yield
        except StoppedAtOnce:
            if self.world.size == 1 and self.nimg > self.saved_nimg:
                self.guard.settle()
                self.metrics.pause()
                self.save()
            raise

    def _milestones(self, stop: StopSignal, evaluate: Evaluate | None, evaluated: set[int], stopping: bool) -> bool:
        train = self.config.train
        last = self.nimg == train.total_nimg
        saving, logging, snapshot = (
            _due(every, self.nimg, train) for every in (train.save_nimg, train.log_nimg, train.snapshot_nimg)
        )
        snapshot &= bool(train.ema_lengths)
        if not (stopping or saving or logging or snapshot or self._evaluation_is_due(evaluate, evaluated)):
            return stopping
        if stopping or saving or snapshot:
            stopping |= self.guard.settle()
        self.metrics.pause()
        if logging:
            self._flush()
        if snapshot:
            self._snapshot()
        if saving or stopping:
            self.save()
        if not stopping or last:  # the evaluation checks for a stop by itself
            self._evaluate_if_due(stop, evaluate, evaluated)
        self.metrics.resume()
        return stopping

    def _flush(self) -> None:
        """Reduce the metrics over ranks, log them, show progress. A collective; the only host sync of the loop."""
        self._at("metrics")
        line, ranks = self.metrics.flush(self.nimg, self.grad_norm)
        machines = self.metrics.machines()
        if self.heartbeat is not None:
            self.heartbeat.facts.update(ranks[self.world.rank])
        if self.log is None:
            return
        lr = learning_rate(self.config, self.nimg - self.config.train.batch_size)
        self.log.write(self.nimg, "train", **line, lr=lr, skipped_steps=self.guard.skipped)
        self.log.write(self.nimg, "system", **machines)
        self.log.show_ranks(ranks)
        self.say(progress(line, self.nimg, self.config.train.total_nimg))
        self.report_uploads()

    def report_uploads(self) -> None:
        """Log which uploads have ended since the last call, and say which failed. Rank 0 only."""
        if self.checkpoints is None or self.log is None:
            return
        for upload in self.checkpoints.ended():
            if upload.error:
                self.say(f"{upload.name} was not sent to {self.config.checkpoint.url}: {upload.error}")
            kind = "upload" if upload.name.startswith(CHECKPOINTS) else "snapshot_upload"
            failed = 0.0 if upload.error is None else 1.0
            if kind == "upload" and not failed:
                self._safe_since = time.monotonic()
            self.log.write(nimg_of(upload.name), kind, seconds=upload.seconds, failed=failed)

    def unsafe_s(self) -> float:
        """Seconds since the last checkpoint was written (to the store, if there is one), or since the start."""
        return time.monotonic() - self._safe_since

    def _evaluation_is_due(self, evaluate: Evaluate | None, evaluated: set[int]) -> bool:
        settings = self.config.eval
        if evaluate is None or settings is None or self.nimg in evaluated:
            return False
        if self.nimg == 0:
            return settings.before_training
        return self.nimg % settings.eval_nimg == 0 or self.nimg == self.config.train.total_nimg

    def _evaluate_if_due(self, stop: StopSignal, evaluate: Evaluate | None, evaluated: set[int]) -> None:
        if evaluate is None or not self._evaluation_is_due(evaluate, evaluated):
            return
        self._at("evaluate")
        try:
            values = evaluate(self.emas["ema"].full(self.world, self.shapes), self.nimg, stop)
        except StoppedAtOnce:
            raise
        except Stopped:
            if self.nimg > self.saved_nimg:
                self.guard.settle()
                self.save()
            raise
        evaluated.add(self.nimg)
        if self.log is not None:
            self.log.write(self.nimg, "eval", **values)
