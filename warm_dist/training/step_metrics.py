"""What is measured between two lines of metrics.jsonl: losses, speed, where the time went, memory, over all ranks."""

from __future__ import annotations

import math
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from warm_dist.config.run import Config
from warm_dist.diffusion.heads import Loss
from warm_dist.distributed.collectives import gather
from warm_dist.distributed.world import World
from warm_dist.networks.flops import flops_per_image, peak_flops
from warm_dist.tracking.machine_load import MachineLoad

SUMS = ("loss", "loss_blurry", "loss_residual", "head_inconsistency", "images")
"""What a window adds up over its images; those with a non-finite loss are left out, and counted as skipped steps."""
PHASES = ("data", "forward", "backward", "update", "ema")
SLOW = 1.5  # a rank that takes so many times the median for its own part of the step is told of


def memory_bytes(device: torch.device) -> int:
    """Most memory so far: of the device's tensors on CUDA, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


class StepMetrics:
    """Sums stay on the device; `flush` is the one place that waits for it."""

    def __init__(self, config: Config, world: World, say: Callable[[str], None]) -> None:
        self.world, self.say = world, say
        self.watch = Stopwatch(world.device)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)
        self.flops = flops_per_image(config)
        self.peak = peak_flops(config, world.device)
        self.meter = (
            MachineLoad(Path(config.output)) if os.environ.get("LOCAL_RANK", "0") == "0" else None
        )  # one a machine
        self.gathers_in_forward = config.engine == "deepspeed" and config.parallel.zero_stage == 3
        self.nimg = self.num_steps = 0
        self.seconds = 0.0
        self._since = time.monotonic()

    def begin(self, nimg: int) -> None:
        """Training goes on at nimg, after something else."""
        self.nimg = nimg
        self.resume()

    def pause(self) -> None:
        """What follows is no training: a save, an evaluation."""
        self.watch.at("")
        self.seconds += time.monotonic() - self._since

    def resume(self) -> None:
        """The end of a pause."""
        self.watch.at("")
        self._since = time.monotonic()

    @torch.no_grad()
    def add(self, result: Loss) -> None:
        """The losses of a micro-batch."""
        rows = torch.stack(
            [result.total, result.blurry, result.residual, result.inconsistency, torch.ones_like(result.total)]
        ).double()
        self.sums += rows.where(torch.isfinite(result.total), 0.0).sum(1)

    def load(self, saved: list[list[float]]) -> None:
        """Go on with the sums of all ranks that a checkpoint holds, of any world size."""
        if len(saved) == self.world.size:
            mine = saved[self.world.rank]
        else:
            mine = [sum(column) for column in zip(*saved, strict=True)] if self.world.is_main else [0.0] * len(SUMS)
        self.sums.copy_(torch.tensor(mine, dtype=torch.float64))

    def flush(self, nimg: int, grad_norm: Tensor) -> tuple[dict[str, float | None], list[dict[str, float]]]:
        """The window's line, and every rank's own figures; the next window begins. A collective."""
        sums = self.sums.clone()
        if self.world.size > 1:
            dist.all_reduce(sums)
        self.sums.zero_()
        *values, count = sums.tolist()
        line: dict[str, float | None] = {
            name: value / count if count else None for name, value in zip(SUMS, values, strict=False)
        }
        steps, seconds = max(1, self.num_steps), max(self.seconds, 1e-9)
        places = self.watch.read()
        mine = {f"{place}_s": places.get(place, 0.0) / steps for place in PHASES}
        mine |= {"images_per_s": (nimg - self.nimg) / self.world.size / seconds}
        mine |= {"memory_bytes": memory_bytes(self.world.device), "step_s": seconds / steps}
        ranks: list[dict[str, float]] = gather(self.world, mine)
        speed = sum(rank["images_per_s"] for rank in ranks)
        norm = float(grad_norm)
        line |= {"images_per_s": speed, "grad_norm": norm if math.isfinite(norm) else None}
        line |= {key: sum(rank[key] for rank in ranks) / len(ranks) for key in ("step_s", *(f"{p}_s" for p in PHASES))}
        line |= {"memory_bytes": max(rank["memory_bytes"] for rank in ranks)}
        line |= {"flops_per_s": speed * self.flops / self.world.size}
        if self.peak:
            line |= {"mfu": speed * self.flops / self.world.size / self.peak}
        line |= self._slowest(ranks)
        self.nimg, self.num_steps, self.seconds = nimg, 0, 0.0
        return line, ranks

    def machines(self) -> dict[str, float]:
        """Every machine's load, of several as `node_K/NAME` in the order of ranks (MLflow's names). A collective."""
        found = [figures for figures in gather(self.world, self.meter.read() if self.meter else None) if figures]
        if len(found) == 1:
            return dict(found[0])
        return {f"node_{k}/{name}": value for k, figures in enumerate(found) for name, value in figures.items()}

    def _slowest(self, ranks: list[dict[str, float]]) -> dict[str, float | None]:
        """The rank that takes longest for what it does alone, before any waiting for others."""
        if len(ranks) == 1:
            return {}
        alone = [rank["data_s"] + (0.0 if self.gathers_in_forward else rank["forward_s"]) for rank in ranks]
        median = sorted(alone)[(len(alone) - 1) // 2]
        slowest = max(range(len(alone)), key=alone.__getitem__)
        lost = alone[slowest] - median
        if alone[slowest] > SLOW * median and lost > 0.05 * ranks[slowest]["step_s"]:
            row = ranks[slowest]
            self.say(
                f"rank {slowest} is slow: {row['data_s'] * 1e3:.1f} ms a step for data and {row['forward_s'] * 1e3:.1f} ms "
                f"for the forward pass, together {lost * 1e3:.1f} ms more than the median rank; all others wait for it"
            )
        return {"slowest_rank": slowest, "slowest_s": lost}


def eta(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def progress(line: dict[str, Any], nimg: int, total_nimg: int) -> str:
    """The line for people."""
    if line["loss"] is None:
        return f"nimg {nimg}/{total_nimg}  no finite loss since the last line"
    return (
        f"nimg {nimg}/{total_nimg}  loss {line['loss']:.4f} "
        f"(blurry {line['loss_blurry']:.4f}, residual {line['loss_residual']:.4f})  {line['images_per_s']:.0f} images/s  "
        f"ETA {eta((total_nimg - nimg) / line['images_per_s'])}"
    )


ON_HOST = ("data",)
"""Places whose time is the host's waiting; on CUDA all others are timed by events on the stream."""


class Stopwatch:
    """`at(place)` begins a place and ends the one before; `read` gives the seconds of each since the last `read`.

    On CUDA an event is recorded and nothing waits before `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._place, self._since = "", time.perf_counter()

    def at(self, place: str) -> None:
        """Begin a place; "" belongs to nothing and is not reported."""
        now = time.perf_counter()
        if not self._cuda or self._place in ON_HOST:
            self._seconds[self._place] += now - self._since
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((place, event))
        self._place, self._since = place, now

    def read(self) -> dict[str, float]:
        """Seconds by place, closed places only; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            for (place, begun), (_, ended) in zip(self._events, self._events[1:], strict=False):
                if place not in ON_HOST:
                    self._seconds[place] += begun.elapsed_time(ended) / 1000
            del self._events[:-1]
        out = {place: seconds for place, seconds in self._seconds.items() if place}
        self._seconds.clear()
        return out
