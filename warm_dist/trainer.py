"""The training loop: from any nimg to the end, bit-equal whether or not it was interrupted on the way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from warm_dist import augment, checkpoint, per_frequency, rng
from warm_dist.config import Config
from warm_dist.config_file import dump
from warm_dist.distributed import Flags, StopSignal, World, gather
from warm_dist.ema import EMA
from warm_dist.engine import build_engine, micro_batches
from warm_dist.errors import CheckpointError, NumericsError, Stopped
from warm_dist.generate import build_network, centre
from warm_dist.loss import loss
from warm_dist.metrics import MetricsLog
from warm_dist.precond import Condition, data_spectrum
from warm_dist.prefetch import Prefetch
from warm_dist.process import training_level
from warm_dist.types import Batch, DataInfo, Level, Loss

SUMS = ("loss", "loss_blurry", "loss_residual", "head_inconsistency", "images")
"""What a window of the metrics adds up over its images."""

Evaluate = Callable[[dict[str, Tensor], int, StopSignal], dict[str, Any]]
"""EMA weights (whole, by name), nimg and who may ask to stop → the metrics of one evaluation. A collective."""


class Prepared(NamedTuple):
    """One rank's step, drawn and on its device: x0 (B, C, H, W) centred, level (B,), noise, condition, the samples."""

    x0: Tensor
    level: Level
    noise: Tensor
    condition: Condition
    batch: Batch


class Trace(NamedTuple):
    """What to name if a step turns out to be non-finite."""

    nimg: int
    keys: tuple[str, ...]
    sigma: Tensor
    totals: list[Tensor]


def learning_rate(config: Config, nimg: int) -> float:
    """Linear ramp over lr_ramp_nimg, linear decay to 0 over the last lr_decay_nimg; for the step that starts at nimg."""
    train = config.train
    ramp = min(1.0, (nimg + train.batch_size) / train.lr_ramp_nimg) if train.lr_ramp_nimg else 1.0
    decay = min(1.0, (train.total_nimg - nimg) / train.lr_decay_nimg) if train.lr_decay_nimg else 1.0
    return train.lr * ramp * decay


def prepare(batch: Batch, config: Config, info: DataInfo, device: torch.device) -> Prepared:
    """Augment, centre, and draw every random number of the batch from its images' global positions."""
    train, positions = config.train, [int(p) for p in batch.positions]
    uniform = rng.uniforms(train.seed, "augment", positions, 2)
    images = batch.images
    if train.horizontal_flips:
        flipped = uniform[:, 0] < 0.5
        images = images.copy()
        images[flipped] = images[flipped][..., ::-1]
    labels = batch.labels.copy()
    labels[uniform[:, 1] < train.label_dropout] = -1
    normal = torch.from_numpy(rng.normals(train.seed, "level", positions, (1,))[:, 0])
    ratio = torch.from_numpy(rng.uniforms(train.seed, "bnr", positions, 1)[:, 0])
    noise = rng.normals(train.seed, "noise", positions, images.shape[1:])

    def send(array: Any) -> Tensor:
        tensor = torch.as_tensor(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    x0 = centre(send(images), torch.tensor(info.channel_mean, device=device))
    condition: Condition = (send(labels),)
    if train.augment:
        drawn = augment.draw(train.seed, positions, train.augment, *images.shape[2:])
        x0 = augment.warp(x0, send(drawn.matrix))
        condition = (*condition, send(drawn.labels))
    level = training_level(config.process, normal, ratio, images.shape[3])  # on the host: equal on every device
    return Prepared(x0, Level(*map(send, level)), send(noise), condition, batch)


def loss_function(config: Config) -> Callable[..., Loss]:
    """The loss that process.preconditioning and process.residual_weight name."""
    if config.process.preconditioning == "per_frequency":
        return per_frequency.loss
    return partial(loss, residual_weight=config.process.residual_weight)


class Trainer:
    """Owns the state of a run: network, optimizer, EMA, nimg, and the sums of the metrics window."""

    def __init__(self, config: Config, world: World, info: DataInfo, run: Path, say: Callable[[str], None]) -> None:
        self.config, self.world, self.info, self.run, self.say = config, world, info, run, say
        network = build_network(config)
        self.shapes = {name: p.shape for name, p in network.named_parameters()}
        self.engine = build_engine(network, config, world)
        self.ema = EMA(self.engine.owned(), config.train.ema_half_life_nimg, config.train.ema_ramp)
        self.spectrum = data_spectrum(info, config.process.sigma_data).to(world.device)
        self.nimg = self.num_steps = 0
        self.loss = loss_function(config)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)
        self.grad_norm = torch.zeros((), device=world.device)
        self.flags = Flags(world, 2)
        self.traces: deque[Trace] = deque(maxlen=4)  # a non-finite step is known two steps later
        self._bad = torch.zeros(1, dtype=torch.bool)
        self._copied: torch.cuda.Event | None = None
        self.train_s, self.window_nimg, self.saved_nimg = 0.0, 0, 0

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    # -- state ------------------------------------------------------------------------------------------------------

    def resume(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        """Take up a checkpoint, of any world size and stage, of the same data and network. Raises CheckpointError."""
        if found is None:
            return
        folder, meta = found
        if meta["fingerprint"] != self.info.fingerprint:
            raise CheckpointError(
                f"{folder}: made from data {meta['fingerprint'][:12]}, this run reads {self.info.fingerprint[:12]}; "
                "point data.manifest at the former, or output at a new folder"
            )
        saved, ours = meta["config"], dump(self.config)
        for section, key in (("network", None), ("process", None), ("data", "num_lanes"), ("data", "chunk"), ("data", "window"),
                             ("train", "seed")):  # fmt: skip
            a, b = (tree[section] if key is None else tree[section][key] for tree in (saved, ours))
            if a != b:
                name = section if key is None else f"{section}.{key}"
                raise CheckpointError(f"{folder}: made with {name} {a}, this run has {b}; give it a new output folder")
        if meta["nimg"] % self.config.train.batch_size:
            raise CheckpointError(f"{folder}: nimg {meta['nimg']} is not a multiple of train.batch_size")
        checkpoint.load(folder, meta, self.engine, self.ema)
        self.nimg, self.num_steps, self.saved_nimg = meta["nimg"], meta["num_steps"], meta["nimg"]
        window = meta["window"]
        if len(window) == self.world.size:
            mine = window[self.world.rank]
        else:
            mine = [sum(column) for column in zip(*window, strict=True)] if self.world.is_main else [0.0] * len(SUMS)
        self.sums.copy_(torch.tensor(mine, dtype=torch.float64))
        self.say(f"resumed at nimg {self.nimg} from {folder}")

    def save(self) -> None:
        """Write a checkpoint at nimg and prune old ones. Only after `settle`. A collective."""
        meta = {
            "fingerprint": self.info.fingerprint,
            "config": dump(self.config),
            "world_size": self.world.size,
            "data": self.info.to_json(),
            "window": gather(self.world, self.sums.tolist()),
        }
        self.saved_nimg = self.nimg
        checkpoint.save(self.checkpoints, self.world, self.engine, self.ema, self.nimg, self.num_steps, meta)
        if self.world.is_main:
            checkpoint.prune(self.checkpoints, self.config.train.keep_last)

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, data: Prepared) -> None:
        """Forward, backward, update, EMA: no value is read back from the device here."""
        train = self.config.train
        rng.seed_torch(train.seed, self.nimg, self.world.rank)
        self.engine.module.train()
        micro, _ = micro_batches(self.config, self.world.size)
        totals = []
        for low in range(0, len(data.x0), micro):
            part = slice(low, low + micro)
            level = Level(data.level.sigma[part], data.level.alpha[part])
            condition = tuple(None if given is None else given[part] for given in data.condition)
            result = self.loss(self.engine, self.spectrum, data.x0[part], level, data.noise[part], condition)
            self.engine.backward(result.total.mean())
            totals.append(result.total.detach())
            with torch.no_grad():
                rows = [
                    result.total,
                    result.blurry,
                    result.residual,
                    result.inconsistency,
                    torch.ones_like(result.total),
                ]
                self.sums += torch.stack(rows).double().sum(1)
        self.traces.append(Trace(self.nimg, data.batch.keys, data.level.sigma, totals))
        self.grad_norm = self.engine.step(learning_rate(self.config, self.nimg))
        self.nimg += train.batch_size
        self.num_steps += 1
        self.ema.update(self.nimg, train.batch_size)

    # -- flags ------------------------------------------------------------------------------------------------------

    def check(self, stop: StopSignal) -> bool:
        """Adopt last step's flags (True: somebody asked to stop), and send this step's. A collective."""
        stopping, broken = self.flags.read()
        if broken:
            self._raise_non_finite()
        self.flags.post(stop.name is not None, self._arrived())
        cuda = self.world.device.type == "cuda"
        bad = (~torch.isfinite(self.grad_norm) | ~torch.isfinite(self.sums[0])).view(1)
        self._bad = torch.empty(1, dtype=torch.bool, pin_memory=cuda)
        self._bad.copy_(bad, non_blocking=True)
        if cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return bool(stopping)

    def _arrived(self) -> bool:
        """Whether the step before was non-finite: its flag has had a whole step to reach the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._bad)

    def settle(self) -> bool:
        """Read the flags still under way, so that no save follows an unread one. A collective."""
        stopping, broken = self.flags.read()
        self.flags.post(False, self._arrived())
        broken |= self.flags.read()[1]
        if broken:
            self._raise_non_finite()
        return bool(stopping)

    def _raise_non_finite(self) -> None:
        mine = []
        for trace in self.traces:
            for key, sigma, total in zip(
                trace.keys, trace.sigma.tolist(), torch.cat(trace.totals).tolist(), strict=True
            ):
                if not torch.isfinite(torch.tensor(total)):
                    mine.append(f"rank {self.world.rank} nimg {trace.nimg} sample {key} at sigma {sigma:.3g}")
        found = [line for lines in gather(self.world, mine) for line in lines]
        where = "; ".join(found[:4]) if found else f"gradient norm at nimg {self.nimg}, every loss finite"
        raise NumericsError(f"non-finite: {where}. The update was not applied; the last checkpoint is untouched")

    # -- the loop ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        batches: Iterator[Batch],
        log: MetricsLog | None,
        stop: StopSignal,
        evaluate: Evaluate | None,
        evaluated: set[int],
    ) -> None:
        """Train to total_nimg. batches: this rank's, from self.nimg on. evaluated: the nimg that need no evaluation again.

        Raises Stopped after a save when a signal came, NumericsError, DataError and what else its parts raise.
        """
        total = self.config.train.total_nimg
        with Prefetch(
            lambda: prepare(next(batches), self.config, self.info, self.world.device), self.world.device
        ) as ahead:
            self._evaluate_if_due(log, stop, evaluate, evaluated)
            for _ in range(min(2, (total - self.nimg) // self.config.train.batch_size)):
                ahead.start()
            self.window_nimg = self.nimg
            clock = time.monotonic()
            while self.nimg < total:
                data = ahead.take()
                if self.nimg + (len(ahead) + 2) * self.config.train.batch_size <= total:
                    ahead.start()
                self.step(data)
                stopping = self.check(stop)
                self.train_s += time.monotonic() - clock
                stopping = self._milestones(log, stop, evaluate, evaluated, stopping)
                if stopping and self.nimg < total:
                    raise Stopped(f"{stop.name or 'a peer'} at nimg {self.nimg}; run the same command again to go on")
                clock = time.monotonic()

    def _milestones(
        self, log: MetricsLog | None, stop: StopSignal, evaluate: Evaluate | None, evaluated: set[int], stopping: bool
    ) -> bool:
        train = self.config.train
        last = self.nimg == train.total_nimg
        saving = stopping or last or self.nimg % train.save_nimg == 0
        if saving:
            stopping |= self.settle()
        if self.nimg % train.log_nimg == 0 or last:
            self._flush(log)
        if saving:
            self.save()
        if not stopping or last:  # the evaluation asks for itself whether to stop
            self._evaluate_if_due(log, stop, evaluate, evaluated)
        return stopping

    def _flush(self, log: MetricsLog | None) -> None:
        """Reduce the window's sums over ranks, write the line, show progress. A collective; the one place that syncs."""
        sums = self.sums.clone()
        if self.world.size > 1:
            dist.all_reduce(sums)
        self.sums.zero_()
        *values, count = sums.tolist()
        means = {name: value / count for name, value in zip(SUMS, values, strict=False)}
        speed = (self.nimg - self.window_nimg) / max(self.train_s, 1e-9)
        self.window_nimg, self.train_s = self.nimg, 0.0
        if log is None:  # not rank 0
            return
        log.write(
            self.nimg,
            "train",
            **means,
            images_per_s=speed,
            lr=learning_rate(self.config, self.nimg - self.config.train.batch_size),
            grad_norm=float(self.grad_norm),
        )
        left = int((self.config.train.total_nimg - self.nimg) / speed)
        self.say(
            f"nimg {self.nimg}/{self.config.train.total_nimg}  loss {means['loss']:.4f} "
            f"(blurry {means['loss_blurry']:.4f}, residual {means['loss_residual']:.4f})  {speed:.0f} images/s  "
            f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )

    def _evaluate_if_due(
        self, log: MetricsLog | None, stop: StopSignal, evaluate: Evaluate | None, evaluated: set[int]
    ) -> None:
        settings = self.config.eval
        if evaluate is None or settings is None or self.nimg in evaluated:
            return
        if self.nimg % settings.eval_nimg and self.nimg != self.config.train.total_nimg:
            return
        try:
            values = evaluate(self.ema.full(self.world, self.shapes), self.nimg, stop)
        except Stopped:
            if self.nimg > self.saved_nimg:
                self.save()
            raise
        evaluated.add(self.nimg)
        if log is not None:
            log.write(self.nimg, "eval", **values)
