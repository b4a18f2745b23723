"""Metrics between two lines of metrics.jsonl, over all ranks: losses, speed, time per phase, memory."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from warm_dist.config.run import Config
from warm_dist.diffusion.heads import Loss
from warm_dist.distributed.collectives import gather
from warm_dist.distributed.environment import from_environment
from warm_dist.distributed.world import World
from warm_dist.networks.flops import flops_per_image, peak_flops
from warm_dist.tracking.machine_load import MachineLoad

LOSSES = ("loss", "loss_blurry", "loss_residual")
SUMS = (*LOSSES, "images", "head_inconsistency", "diagnosed")
"""Sums over images, without those of non-finite loss, which count as skipped steps, and the numbers of these images.

The heads' inconsistency is only computed in the step before a line of metrics; `diagnosed` counts that step's images.
"""
PHASES = ("data", "forward", "backward", "update", "ema")
SLOW = 1.5  # warn about a rank slower than this multiple of the median


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device's tensors on CUDA, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


class StepMetrics:
    """Collects a rank's metrics; the sums stay on the device, and only `flush` waits for it."""

    def __init__(self, config: Config, world: World, say: Callable[[str], None]) -> None:
        self.world, self.say = world, say
        self.watch = Stopwatch(world.device)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)
        self.flops = flops_per_image(config)
        self.peak = peak_flops(config, world.device)
        first_here = from_environment("LOCAL_RANK", 0) == 0
        self.meter = MachineLoad(Path(config.output)) if first_here else None  # one per machine
        self.gathers_in_forward = config.engine == "deepspeed" and config.parallel.zero_stage == 3
        self.nimg = self.num_steps = 0
        self.seconds = 0.0
        self._since = time.monotonic()

    def begin(self, nimg: int) -> None:
        """Start measuring at nimg."""
        self.nimg = nimg
        self.resume()

    def pause(self) -> None:
        """Stop the clock for what is not training: a save, an evaluation."""
        self.watch.at("")
        self.seconds += time.monotonic() - self._since

    def resume(self) -> None:
        """Start the clock again."""
        self.watch.at("")
        self._since = time.monotonic()

    @torch.no_grad()
    def add(self, result: Loss) -> None:
        """Add the losses of a micro-batch."""
        counts = torch.ones_like(result.total)
        rows = [result.total, result.blurry, result.residual, counts]
        if result.inconsistency is not None:
            rows += [result.inconsistency, counts]
        finite = torch.stack(rows).where(torch.isfinite(result.total), 0.0)
        self.sums[: len(rows)] += finite.sum(1, dtype=torch.float64)

    def load(self, saved: list[list[float]]) -> None:
        """Continue from the sums of all ranks in a checkpoint, of any world size.

        Former checkpoints hold five sums a rank: the heads' inconsistency of all images, here left out, came fourth.
        """
        rows = [[*row[:3], row[4], 0.0, 0.0] if len(row) == 5 else row for row in saved]
        if len(rows) == self.world.size:
            mine = rows[self.world.rank]
        else:
            mine = [sum(column) for column in zip(*rows, strict=True)] if self.world.is_main else [0.0] * len(SUMS)
        self.sums.copy_(torch.tensor(mine, dtype=torch.float64))

    def flush(self, nimg: int, grad_norm: Tensor) -> tuple[dict[str, float | None], list[dict[str, float]]]:
        """The metrics since the last flush, and every rank's own; resets them. A collective."""
        sums = self.sums.clone()
        if self.world.size > 1:
            dist.all_reduce(sums)
        self.sums.zero_()
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        counts = dict.fromkeys(LOSSES, total["images"]) | {"head_inconsistency": total["diagnosed"]}
        line: dict[str, float | None] = {name: total[name] / n if n else None for name, n in counts.items()}
        steps, seconds = max(1, self.num_steps), max(self.seconds, 1e-9)
        spent = self.watch.read()
        mine = {f"{phase}_s": spent.get(phase, 0.0) / steps for phase in PHASES}
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
        """Every machine's load; of several, keys are `node_K/NAME` in the order of ranks. A collective."""
        found = [figures for figures in gather(self.world, self.meter.read() if self.meter else None) if figures]
        if len(found) == 1:
            return dict(found[0])
        return {f"node_{k}/{name}": value for k, figures in enumerate(found) for name, value in figures.items()}

    def _slowest(self, ranks: list[dict[str, float]]) -> dict[str, float | None]:
        """The rank slowest in the phases before any wait for others; says so if it is far from the median."""
        if len(ranks) == 1:
            return {}
        alone = [rank["data_s"] + (0.0 if self.gathers_in_forward else rank["forward_s"]) for rank in ranks]
        median = statistics.median_low(alone)
        slowest = max(range(len(alone)), key=alone.__getitem__)
        row, lost = ranks[slowest], alone[slowest] - median
        if alone[slowest] > SLOW * median and lost > 0.05 * row["step_s"]:
            data_ms, forward_ms = row["data_s"] * 1e3, row["forward_s"] * 1e3
            self.say(
                f"rank {slowest} is slow: {data_ms:.1f} ms a step for data and {forward_ms:.1f} ms for the forward "
                f"pass, together {lost * 1e3:.1f} ms more than the median rank; all others wait for it"
            )
        return {"slowest_rank": slowest, "slowest_s": lost}


def eta(seconds: float) -> str:
    """A time as H:MM:SS."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def progress(line: dict[str, Any], nimg: int, total_nimg: int) -> str:
    """The metrics as a progress line."""
    if line["loss"] is None:
        return f"nimg {nimg}/{total_nimg}  no finite loss since the last line"
    return (
        f"nimg {nimg}/{total_nimg}  loss {line['loss']:.4f} (blurry {line['loss_blurry']:.4f}, residual "
        f"{line['loss_residual']:.4f})  {line['images_per_s']:.0f} images/s  {line['memory_bytes'] / 2**30:.2f} GiB  "
        f"ETA {eta((total_nimg - nimg) / line['images_per_s'])}"
    )


ON_HOST = ("data",)
"""Phases timed on the host; on CUDA the others are timed by events on the stream."""


class Stopwatch:
    """Times phases: `at` begins one and ends the one before, `read` returns the seconds of each since the last `read`.

    On CUDA, `at` records an event and only `read` waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._phase, self._since = "", time.perf_counter()

    def at(self, phase: str) -> None:
        """Begin a phase; "" is none and is not reported."""
        now = time.perf_counter()
        if not self._cuda or self._phase in ON_HOST:
            self._seconds[self._phase] += now - self._since
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((phase, event))
        self._phase, self._since = phase, now

    def read(self) -> dict[str, float]:
        """Seconds by phase, without the one that has not ended; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            for (phase, begun), (_, ended) in pairwise(self._events):
                if phase not in ON_HOST:
                    self._seconds[phase] += begun.elapsed_time(ended) / 1000
            del self._events[:-1]
        out = {phase: seconds for phase, seconds in self._seconds.items() if phase}
        self._seconds.clear()
        return out
