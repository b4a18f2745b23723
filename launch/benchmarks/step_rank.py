"""One rank of a measurement of `launch/bench.py step`: the trainer's own loop and stopwatch on made-up images."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.benchmarks.pictures import images, made_up
from warm_dist.errors import WarmDistError
from warm_dist.files import read_json
from warm_dist.runs.folder import METRICS, MIRROR

if TYPE_CHECKING:
    from warm_dist.distributed.world import World
    from warm_dist.training.trainer import Trainer


MIRROR_S = 120.0  # the longest to wait for the mirror to find its server, or to send the last line


class Side:
    """Processor time of the calls that are not the network's, each wrapped where it is made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def wrap(self, owner: Any, name: str) -> None:
        """Time the calls of owner.name; a call inside of another is part of it."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, began = True, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began
                self._inside = False

        setattr(owner, name, timed)


def rank(job: dict[str, Any]) -> None:
    """Train as the job says; rank 0 writes what a step took after the first line, which warms up, to job["out"]."""
    from warm_dist.config.run import load_config
    from warm_dist.distributed.collectives import barrier
    from warm_dist.distributed.stop import StopSignal
    from warm_dist.distributed.world import join, shutdown
    from warm_dist.runs.folder import describe_run, write_end
    from warm_dist.runs.metrics import MetricsLog, read_metrics
    from warm_dist.training.step_metrics import PHASES
    from warm_dist.training.trainer import Trainer

    config = load_config(job["config"])
    run = Path(config.output)
    world = join(config.parallel.timeout_s)
    trainer = Trainer(config, world, made_up(config), lambda text: None)
    log = MetricsLog(run / METRICS, 1) if world.is_main else None
    side = Side()
    if job["kind"] == "bare":
        strip(trainer)
    else:
        for ema in trainer.emas.values():
            side.wrap(ema, "update")
        for owner, name in ((trainer.metrics.watch, "at"), (trainer.metrics, "add"), (trainer.metrics, "flush")):
            side.wrap(owner, name)
        if log is not None:
            side.wrap(log, "write")
    mirror = None
    if job["kind"] == "mirror":
        from warm_dist.tracking.follow import start_mirror

        assert log is not None
        log.write(0, "event", text="start")  # the mirror asks for its server when there is something to send
        describe_run(run, config, 1, {})
        mirror = start_mirror(run)
        _wait(lambda: _sent(run) > 0, "the mirror to find its server")
    clocks = {"wall_s": time.perf_counter, "process_s": time.process_time, "main_s": time.thread_time}
    clocks |= {"side_s": lambda: side.seconds, "mirror_s": lambda: _cpu_s(mirror.pid) if mirror else 0.0}
    marks: list[dict[str, float]] = []
    flush = trainer.metrics.flush

    def marked(*args: Any) -> Any:
        result = flush(*args)
        marks.append({name: clock() for name, clock in clocks.items()})
        return result

    trainer.metrics.flush = marked  # type: ignore[assignment, method-assign]
    barrier(world, "start")
    trainer.fit(images(config, world), log, StopSignal(), None, set())
    if mirror is not None:
        _wait(lambda: _sent(run) == (run / METRICS).stat().st_size, "the mirror to send the last line")
        marks[-1]["mirror_s"] = _cpu_s(mirror.pid)
        write_end(run, 1, trainer.nimg, None)
    parameters = sum(shape.numel() for shape in trainer.shapes.values())
    speed = _bandwidth(world, parameters)
    if world.is_main:
        lines = [line for line in read_metrics(run / METRICS) if line["kind"] == "train"][1:]
        steps = (len(marks) - 1) * config.train.log_nimg // config.train.batch_size
        found: dict[str, float] = {name: (marks[-1][name] - marks[0][name]) / steps for name in clocks}
        found |= {f"{place}_s": statistics.mean(line[f"{place}_s"] for line in lines) for place in PHASES}
        found |= {"parameters": parameters, "flops": trainer.metrics.flops, "bandwidth": speed}
        found |= {"mirror_start_s": marks[0]["mirror_s"], "images_per_s": config.train.batch_size / found["wall_s"]}
        Path(job["out"]).write_text(json.dumps(found))
    shutdown()


def strip(trainer: Trainer) -> None:
    """Leave out the EMAs, the sums and the stopwatch."""

    def nothing(*args: Any) -> None:
        pass

    trainer.emas = {}
    trainer.metrics.add = nothing  # type: ignore[assignment, method-assign]
    trainer.metrics.watch.at = nothing  # type: ignore[assignment, method-assign]


def _bandwidth(world: World, parameters: int) -> float:
    """Bytes a second that a rank sends in an all-reduce of all parameters; 0 for one rank."""
    import torch
    import torch.distributed as dist

    if world.size == 1:
        return 0.0
    values = torch.zeros(parameters, device=world.device)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        dist.all_reduce(values)
        float(values[0])
        seconds.append(time.perf_counter() - began)
    return 2 * (world.size - 1) / world.size * 4 * parameters / statistics.median(seconds[1:])


def _cpu_s(pid: int) -> float:
    """Processor time of a process, its children not counted: clock_getcpuclockid(3) of Linux, to the nanosecond."""
    return time.clock_gettime(~pid << 3 | 2)


def _sent(run: Path) -> int:
    """Bytes of metrics.jsonl that MLflow has."""
    return int((read_json(run / MIRROR) or {}).get("offset", 0))


def _wait(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + MIRROR_S
    while not done():
        if time.monotonic() > deadline:
            raise WarmDistError(f"waited {MIRROR_S:.0f} s for {what}")
        time.sleep(0.05)


if __name__ == "__main__":
    rank(json.loads(sys.argv[1]))
