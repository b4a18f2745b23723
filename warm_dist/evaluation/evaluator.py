"""Evaluation in training and by launch/evaluate.py: images, features, Fréchet distance beside its floor."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from warm_dist.checkpoints.weights import Model, load_guide
from warm_dist.config.bnr import describe
from warm_dist.config.run import Config, EvalConfig, SamplerConfig, sampling_precision
from warm_dist.data import DataInfo
from warm_dist.diffusion.samplers import nfe
from warm_dist.distributed.collectives import any_rank, collect, gather, on_main
from warm_dist.distributed.stop import PATIENCE_S, StopSignal
from warm_dist.distributed.world import World
from warm_dist.errors import ConfigError, Stopped
from warm_dist.evaluation import frechet, reference
from warm_dist.evaluation.extractors import make_extractor
from warm_dist.evaluation.feature_stream import FeatureStream, batches_of, each_batch
from warm_dist.evaluation.generate import draw_labels, fitting_batch, generate
from warm_dist.evaluation.kid_precision_recall import kid, precision_recall
from warm_dist.evaluation.reference import Reference, ReferenceSpec
from warm_dist.evaluation.sampler_choice import describe_sampling
from warm_dist.figures import save_grid
from warm_dist.networks.compiled import compile_blocks, compiles
from warm_dist.networks.unet import build_network
from warm_dist.runs.folder import SAMPLES
from warm_dist.store.base import split_url
from warm_dist.store.open import open_store

Read = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""Rows of the data set, (n,) → images (n, C, H, W) uint8."""
IMAGES_PER_FEATURE = 1.6
"""With fewer images per feature, the covariance is too uncertain for a Fréchet distance to rank models."""
MEASURES = ("frechet", "kid", "precision", "recall")
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)


class Evaluator:
    """Evaluates networks of one config: holds the extractor, a network and the real images' statistics.

    Load weights into `network` before `block`. read: returns real images. Raises ConfigError, and as `make_extractor`.
    """

    def __init__(
        self, config: Config, world: World, info: DataInfo, read: Read, run: Path, say: Callable[[str], None]
    ) -> None:
        assert config.eval is not None
        self.config, self.world, self.info, self.read, self.run, self.say = config, world, info, read, run, say
        self.settings: EvalConfig = config.eval
        self.num_real = min(self.settings.reference_images or info.num_images, info.num_images)
        if self.num_real < 2:
            raise ConfigError(f"eval needs at least 2 real images to compare with, the data has {info.num_images}")
        settings, endpoint = self.settings, config.data.endpoint_url
        self.extractor = make_extractor(
            settings.extractor,
            settings.extractor_url,
            settings.extractor_sha256,
            world.device,
            bf16=settings.extractor_bf16,
            resolution=info.resolution,
            endpoint_url=endpoint,
        )
        folder = split_url(config.data.manifest)[0]
        self.cache = Path(settings.cache_dir) if settings.cache_dir else None
        places = [(folder, endpoint), *([(str(self.cache), None)] if self.cache else []), (str(run), None)]
        self.stores = [open_store(*place) for place in places]
        self.network = build_network(config).to(world.device)
        self.compiled = compiles(config.parallel.compile, world.device)
        if self.compiled:
            compile_blocks(self.network, config.parallel.compile_cache, say)
        self.batch_size = settings.batch_size or self._fitting_batch()
        self._reference: Reference | None = None
        needed = round(IMAGES_PER_FEATURE * self.extractor.num_features)
        for name, n in (("eval.num_images", settings.num_images), ("real images compared", self.num_real)):
            if n < needed:
                self.say(
                    f"warning: {name} {n:,} is too few for {self.extractor.num_features:,} features; use {needed:,} or more "
                    "to rank models"
                )

    def spec(self, sampler: SamplerConfig) -> frechet.FidSpec:
        """The fingerprint of a number measured with this sampler."""
        settings, train = self.settings, self.config.train
        return frechet.FidSpec(
            extractor=self.extractor.name,
            extractor_sha256=self.extractor.sha256,
            resize=self.extractor.resize,
            num_images=settings.num_images,
            kid_images=settings.kid_images,
            reference=f"{self.info.fingerprint}:{self.num_real}",
            sampler=describe_sampling(self.config, sampler),
            nfe=nfe(sampler.method, sampler.num_steps),
            ema=f"half-life {train.ema_half_life_nimg}, ramp {train.ema_ramp}",
            seed=settings.seed,
        )

    def __call__(self, weights: dict[str, Tensor], nimg: int, stop: StopSignal) -> dict[str, Any]:
        """One evaluation in training: its metrics, and on rank 0 samples/NIMG.png. A collective.

        Uses one block of seeds, eval.num_blocks at the end of the run. Raises as `block`.
        """
        begun = time.monotonic()
        self.network.load_state_dict(weights)
        grid = self.run / SAMPLES / f"{nimg:012d}.png"
        sampler, title = self.config.sampler, f"nimg {nimg}"
        blocks = range(self.settings.num_blocks if nimg == self.config.train.total_nimg else 1)
        done = [self.block(sampler, block, stop, title, grid if block == 0 else None) for block in blocks]
        values = self.summary(sampler, done, title) | {"grid": str(grid.relative_to(self.run))}
        return values | {"seconds": time.monotonic() - begun}

    def block(
        self, sampler: SamplerConfig, block: int, stop: StopSignal, title: str, grid: Path | None
    ) -> dict[str, float]:
        """Evaluate the current weights under one sampler with one block of seeds. A collective.

        Block k has the images k n … (k + 1) n - 1 of the stream eval.seed. Rank 0 writes the first ones to the picture
        `grid`. Raises on all ranks Stopped, between two batches, if any rank was asked to stop, and NumericsError,
        DataError or OutputError of any rank.
        """
        begun = time.monotonic()
        settings, spec = self.settings, self.spec(sampler)
        number = f", block {block + 1}" if block else ""
        self.say(f"{title}  sampling {settings.num_images} images, {spec.nfe} network evaluations each{number}")
        kept = np.arange(settings.num_images) < settings.kid_images
        stream = FeatureStream(self.world, self.extractor, [np.ones(settings.num_images, bool)], kept)
        guide = functools.cache(lambda: load_guide(sampler, self.info, self.world.device))  # may fail on one rank alone
        model = Model(self.network, self.config, self.info)
        shown: list[tuple[int, NDArray[np.uint8]]] = []

        def work(numbers: range) -> None:
            indices = range(numbers.start + block * settings.num_images, numbers.stop + block * settings.num_images)
            images = generate(
                model,
                indices,
                draw_labels(model, sampler, settings.seed, indices),
                seed=settings.seed,
                device=self.world.device,
                batch_size=self.batch_size if self.compiled else len(numbers),
                fill=self.compiled,
                sampler=sampler,
                guide=guide(),
            )
            stream.add(numbers, images)
            shown.extend((k, image) for k, image in zip(numbers, images, strict=True) if grid and k < settings.grid**2)

        after = self._after("sampling", settings.num_images, stop)
        each_batch(self.world, settings.num_images, self.batch_size, work, after)
        (moments,), rows = stream.result()
        pictures = sorted((pair for part in collect(self.world, shown) for pair in part), key=itemgetter(0))
        real = self._real(stop)

        def finish() -> dict[str, float]:
            if grid:
                save_grid(np.stack([image for _, image in pictures]), grid, columns=settings.grid)
            assert real is not None
            distance = frechet.frechet_distance(moments, real.moments)
            values = {"frechet": distance, "floor": real.floor, "floor_n": real.floor_n}
            if min(len(rows), len(real.rows)) > NEIGHBOURS:
                precision, recall = precision_recall(rows, real.rows, NEIGHBOURS)
                values |= {"kid": kid(rows, real.rows), "precision": precision, "recall": recall}
            return values

        values: dict[str, float] = on_main(self.world, finish)
        return values | {"seconds": time.monotonic() - begun}

    def summary(self, sampler: SamplerConfig, blocks: Sequence[dict[str, float]], title: str) -> dict[str, Any]:
        """Mean over blocks, the spread (standard deviation) of their distances, the floor, and `identity`."""
        spec = self.spec(sampler)
        values: dict[str, Any] = {
            name: statistics.mean(block[name] for block in blocks) for name in MEASURES if name in blocks[0]
        }
        values["spread"] = statistics.stdev(block["frechet"] for block in blocks) if len(blocks) > 1 else None
        floor, floor_n = blocks[0]["floor"], int(blocks[0]["floor_n"])
        number = f"{values['frechet']:.2f}" + ("" if len(blocks) == 1 else f" ± {values['spread']:.2f}")
        times = f" x {len(blocks)}" if len(blocks) > 1 else ""
        self.say(
            f"{title}  {spec.name} {number}, floor {floor:.2f} (real against real, {floor_n} and "
            f"{self.num_real - floor_n}), n {spec.num_images}{times}, NFE {spec.nfe}, spec {spec.hash}"
        )
        return values | {"blocks": len(blocks), "floor": floor, "floor_n": floor_n} | self.identity(sampler)

    def identity(self, sampler: SamplerConfig) -> dict[str, Any]:
        """What identifies a number measured with this sampler."""
        spec = self.spec(sampler)
        return {
            "num_images": spec.num_images,
            "nfe": spec.nfe,
            "bnr": describe(self.config.process.bnr if sampler.bnr is None else sampler.bnr),
            "method": sampler.method,
            "name": spec.name,
            "spec": spec.hash,
            "measure": spec.measure,
        }

    def _fitting_batch(self) -> int:
        """The batch that fits into every rank's device. A collective."""
        world, precision = self.world, sampling_precision(self.config, self.config.sampler)
        fits = fitting_batch(self.config, precision, world.device, self.settings.num_images // world.size)
        fewest: int = min(gather(world, fits))
        return fewest

    def _real(self, stop: StopSignal) -> Reference | None:
        """The reference, on rank 0: kept from earlier, read from a store, or measured. A collective."""
        spec = ReferenceSpec(
            extractor=self.extractor.name,
            extractor_sha256=self.extractor.sha256,
            resize=self.extractor.resize,
            fingerprint=self.info.fingerprint,
            num_real=self.num_real,
            num_images=self.settings.num_images,
            num_rows=min(self.settings.kid_images, self.num_real),
        )
        patience_s = self.config.parallel.timeout_s / 2  # the other ranks wait for rank 0 meanwhile
        with contextlib.ExitStack() as stack:
            if self.world.is_main and self._reference is None:
                with stop.at_once("looking for real images' statistics", PATIENCE_S):
                    self._reference = reference.load(self.stores, spec)
                    if self._reference is None and self.cache:
                        stack.enter_context(reference.turn(self.cache, spec, patience_s))
                        self._reference = reference.load(self.stores, spec)
            if any_rank(self.world, self.world.is_main and self._reference is None):
                after, size = self._after("real features", self.num_real, stop), self.batch_size

                def read(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
                    with stop.at_once("reading real images", PATIENCE_S):
                        return self.read(rows)

                found = reference.measure(self.world, self.extractor, spec, self.info.num_images, read, size, after)
                if self.world.is_main:
                    self._reference = found
                    with stop.at_once("keeping real images' statistics", PATIENCE_S):
                        where = reference.keep(self.stores, spec, found)
                    self.say(f"real images' statistics: {where or 'not kept, no store accepts them'}")
        return self._reference

    def _after(self, what: str, num_images: int, stop: StopSignal) -> Callable[[int], None]:
        """A callback for each batch: moves rank 0's progress bar, raises Stopped if any rank was asked to stop."""
        from tqdm import tqdm

        total = sum(map(len, batches_of(self.world, num_images, self.batch_size)[0]))
        bar = tqdm(total=total, desc=f"{what} (rank 0)", unit="image", disable=None if self.world.is_main else True)

        def after(done: int) -> None:
            bar.update(done)
            if bar.n >= total:
                bar.close()
            if any_rank(self.world, stop.name is not None):
                raise Stopped(f"{stop.name or 'a peer'} during evaluation; run the same command again to resume")

        return after
