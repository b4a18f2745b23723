"""One evaluation: sample on all ranks, features, Fréchet distance beside its floor, a picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from warm_dist import fid, rng
from warm_dist.config import Config, EvalConfig, SamplerConfig
from warm_dist.distributed import StopSignal, World, any_rank, gather, on_main
from warm_dist.errors import ConfigError, OutputError, Stopped
from warm_dist.figures import save_grid
from warm_dist.generate import Model, build_network, describe_sampling, generate, load_guide, sample_labels
from warm_dist.sampler import nfe
from warm_dist.types import DataInfo

Read = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""Rows of the data set → images (n, C, H, W) uint8."""


def in_order(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows that were dealt to the ranks in turn (rank r of W took r, r + W, …), as they were: alike at any world size."""
    rows = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), np.float32)
    for rank, part in enumerate(parts):
        rows[rank :: len(parts)] = part
    return rows


class Polls:
    """Asks all ranks after every batch whether to stop; ranks with a batch less ask as often."""

    def __init__(self, world: World, stop: StopSignal, settings: EvalConfig) -> None:
        self.world, self.stop = world, stop
        largest_share = -(-settings.num_images // world.size)
        self.left = -(-largest_share // settings.batch_size)

    def once(self) -> None:
        self.left -= 1
        if any_rank(self.world, self.stop.name is not None):
            raise Stopped(f"{self.stop.name or 'a peer'} during evaluation; run the same command again to go on")

    def rest(self) -> None:
        while self.left > 0:
            self.once()


class Evaluator:
    """Called with the EMA weights at some nimg; keeps extractor and real statistics for the next call."""

    def __init__(
        self, config: Config, world: World, info: DataInfo, read: Read, run: Path, say: Callable[[str], None]
    ) -> None:
        assert config.eval is not None
        self.config, self.world, self.info, self.read, self.run, self.say = config, world, info, read, run, say
        self.settings: EvalConfig = config.eval
        self.num_real = min(self.settings.reference_images or info.num_images, info.num_images)
        if self.num_real < 2:
            raise ConfigError(f"eval needs 2 images to compare with, the data has {info.num_images}")
        self.extractor = fid.make_extractor(
            self.settings.extractor, self.settings.extractor_url, self.settings.extractor_sha256, world.device
        )
        self.network = build_network(config).to(world.device)
        self._real: tuple[fid.Statistics, float, int] | None = None

    def spec(self, sampler: SamplerConfig) -> fid.FidSpec:
        """The fingerprint of what the number means."""
        settings = self.settings
        return fid.FidSpec(
            extractor=self.extractor.name,
            extractor_sha256=self.extractor.sha256,
            resize=self.extractor.resize,
            num_images=settings.num_images,
            reference=f"{self.info.fingerprint}:{self.num_real}",
            sampler=describe_sampling(self.config, sampler),
            nfe=nfe(sampler.method, sampler.num_steps),
            ema=f"half-life {self.config.train.ema_half_life_nimg}, ramp {self.config.train.ema_ramp}",
            seed=settings.seed,
        )

    def __call__(self, weights: dict[str, Tensor], nimg: int, stop: StopSignal) -> dict[str, Any]:
        """Metrics of one evaluation in training; on rank 0 also samples/NIMG.png. A collective. Errors as `measure`."""
        self.network.load_state_dict(weights)
        picture = self.run / "samples" / f"{nimg:012d}.png"
        return self.measure(self.config.sampler, stop, picture, f"nimg {nimg}")

    def measure(self, sampler: SamplerConfig, stop: StopSignal, grid: Path, title: str) -> dict[str, Any]:
        """Metrics of the present weights under one sampler; rank 0 writes the picture `grid`. A collective.

        Raises Stopped on all ranks, between two batches of samples, when one was asked to stop.
        """
        begun = time.monotonic()
        settings, world, spec = self.settings, self.world, self.spec(sampler)
        guide = load_guide(sampler, self.info, world.device)
        self.say(f"{title}  sampling {settings.num_images} images, {spec.nfe} network evaluations each")
        indices = range(world.rank, settings.num_images, world.size)
        show, polls = self._progress("sampling", len(indices)), Polls(world, stop, settings)

        def progress(done: int) -> None:
            show(done)
            polls.once()

        images = generate(
            Model(self.network, self.config, self.info),
            indices,
            sample_labels(settings.seed, indices, self.config.data.num_classes),
            seed=settings.seed,
            device=world.device,
            batch_size=settings.batch_size,
            sampler=sampler,
            guide=guide,
            progress=progress,
        )
        polls.rest()
        sampled = time.monotonic()
        rows = gather(world, fid.features(self.extractor, images, settings.batch_size))
        shown = [pairs for part in gather(world, self._shown(indices, images)) for pairs in part]
        self._need_real()
        distance, floor, floor_n = on_main(world, lambda: self._compare(in_order(rows)))
        if world.is_main:
            pictures = np.stack([image for _, image in sorted(shown, key=lambda pair: pair[0])])
            save_grid(pictures, grid, columns=settings.grid)
        self.say(
            f"{title}  {spec.name} {distance:.2f}, floor {floor:.2f} (real against real, {floor_n} each), "
            f"n {settings.num_images}, NFE {spec.nfe}, spec {spec.hash}; {grid}"
        )
        return {
            "frechet": distance,
            "floor": floor,
            "floor_n": floor_n,
            "name": spec.name,
            "spec": spec.hash,
            "grid": str(grid.relative_to(self.run)),
            "sampling_s": sampled - begun,
            "seconds": time.monotonic() - begun,
        }

    def _shown(self, indices: range, images: NDArray[np.uint8]) -> list[tuple[int, NDArray[np.uint8]]]:
        return [(i, image) for i, image in zip(indices, images, strict=True) if i < self.settings.grid**2]

    def _progress(self, what: str, total: int) -> Callable[[int], None]:
        from tqdm import tqdm

        bar = tqdm(total=total, desc=f"{what} (rank 0)", unit="image", disable=None if self.world.is_main else True)

        def advance(done: int) -> None:
            bar.update(done)
            if bar.n >= total:
                bar.close()

        return advance

    def _compare(self, rows: NDArray[np.float32]) -> tuple[float, float, int]:
        assert self._real is not None
        real, floor, floor_n = self._real
        return fid.frechet_distance(fid.Statistics.of(rows), real), floor, floor_n

    def _need_real(self) -> None:
        """Have rank 0 hold the real images' statistics, the floor and the number of images on each side of it.

        Kept in the run's folder, so that a resumed run does not compute them again. A collective.
        """
        if self.world.is_main and self._real is None:
            self._real = self._load()
        if any_rank(self.world, self.world.is_main and self._real is None):
            self._measure()

    @property
    def _file(self) -> Path:
        source = f"{self.extractor.sha256[:12]}-{self.info.fingerprint[:12]}-{self.num_real}-{self.settings.num_images}"
        return self.run / f"reference-{source}.npz"

    def _load(self) -> tuple[fid.Statistics, float, int] | None:
        try:
            with np.load(self._file) as file:
                n, total, outer = int(file["n"]), file["total"], file["outer"]
                return fid.Statistics(n, total, outer), float(file["floor"]), int(file["floor_n"])
        except (OSError, ValueError, KeyError, EOFError):
            return None

    def _measure(self) -> None:
        chosen = np.arange(self.info.num_images)
        if self.num_real < self.info.num_images:
            chosen = np.sort(rng.generator(0, "reference").permutation(self.info.num_images)[: self.num_real])
        mine = chosen[self.world.rank :: self.world.size]
        size, parts = self.settings.batch_size, []
        advance = self._progress("real features", len(mine))
        for low in range(0, len(mine), size):
            parts.append(fid.features(self.extractor, self.read(mine[low : low + size]), size))
            advance(len(parts[-1]))
        rows = in_order(gather(self.world, np.concatenate(parts)))
        on_main(self.world, lambda: self._keep(rows))

    def _keep(self, rows: NDArray[np.float32]) -> None:
        floor, floor_n = fid.floor(rows, self.settings.num_images, seed=0)
        real = fid.Statistics.of(rows)
        self._real = real, floor, floor_n
        temporary = self._file.with_suffix(".part.npz")
        try:
            np.savez(temporary, n=real.n, total=real.total, outer=real.outer, floor=floor, floor_n=floor_n)
            temporary.replace(self._file)
        except OSError as error:
            raise OutputError(f"{self._file}: cannot be written ({error.strerror})") from None
