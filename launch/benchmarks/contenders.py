"""Contenders of benchmarks: their configs, peers in processes of their own, and rounds of everybody within a time."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from launch.benchmarks.result import ROOT
from warm_dist.errors import WarmDistError

if TYPE_CHECKING:
    import torch

    from warm_dist.config.run import Config

ENGINES = ("local", "zero0", "zero1", "zero2", "zero3")
PRECISIONS = ("fp32", "bf16")
STEPS, WARM_UP = 8, 3  # training steps of a round, and before the first one
SLACK_S = 5.0  # for what cannot be cut off at once: a compiler's process, kernels that run


def parts_of(name: str) -> tuple[str, str, bool]:
    """Of the contender WHAT-PRECISION, or WHAT-PRECISION-compiled: what, precision, and whether it is compiled."""
    what, precision, *how = name.split("-")
    return what, precision, bool(how)


def unlogged(batch_size: int) -> dict[str, Any]:
    """Config keys of a training that logs, saves and evaluates nothing; its batch is one micro-batch."""
    long = batch_size << 20
    return {
        "data.num_lanes": 1,
        "train.batch_size": batch_size,
        "train.micro_batch_size": None,
        "train.total_nimg": long,
        "train.log_nimg": long,
        "train.save_nimg": long,
        "train.snapshot_nimg": None,
        "checkpoint.keep_every_nimg": None,
        "eval": None,
    }


def engine_keys(engine: str, precision: str) -> dict[str, Any]:
    """Config keys of an engine, local or zero0 to zero3, in fp32 or bf16."""
    which = (
        {"engine": "local"} if engine == "local" else {"engine": "deepspeed", "parallel.zero_stage": int(engine[-1])}
    )
    return which | {"parallel.precision": precision}


def changed(path: str | Path, mine: dict[str, Any], changes: list[str]) -> Config:
    """The config of a file with the keys `mine`, then the user's `changes`, a.b=VALUE. Raises ConfigError."""
    from warm_dist.config.run import load_config

    return load_config(path, [*(f"{key}={json.dumps(value)}" for key, value in mine.items()), *changes])


class Peer:
    """A peer's training step in a process of its own, built, warm, and measured once in `facts`.

    python: of the peers' environment. log: a file for what it says. Raises WarmDistError with the end of it if the process ends.
    """

    def __init__(
        self, python: Path, name: str, compiled: bool, config: Config, device: torch.device, log: Path
    ) -> None:
        data, network = config.data, config.network
        job = {
            "peer": name,
            "compiled": compiled,
            "device": device.type,
            "images": config.train.batch_size,
            "image_channels": data.channels,
            "resolutions": [data.resolution >> level for level in range(len(network.channel_mult))],
            "attention": network.attention_resolutions,
            "widths": [network.channels * multiple for multiple in network.channel_mult],
            "channels": network.channels,
            "channel_mult": network.channel_mult,
            "num_blocks": network.num_blocks,
            "calls": STEPS,
            "warm_up": WARM_UP,
        }
        command = [str(python), str(ROOT / "launch" / "benchmarks" / "peers" / "network.py"), json.dumps(job)]
        self._log = log
        with log.open("ab") as err:  # it ends with its stdin, so that it cannot outlive us
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True
            )
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def round(self) -> dict[str, Any]:
        """See Subject."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise WarmDistError(said[-1] if said else f"ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


class Contender(Protocol):
    """What takes turns. facts: what is measured once."""

    facts: dict[str, Any]

    def round(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class OutOfTime(BaseException):
    """A time is over; no Exception, since torch.compile takes those for failures of its own."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in here once so many seconds are over. In the main thread; a timer that runs already goes on after."""

    def end(*_: object) -> None:
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, end)
    others = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, handler)


class Rounds:
    """Rounds of all contenders in turn, within a budget of seconds.

    start: builds a contender by name, when its first turn comes. What a start and the first round of a contender may
    take is what the further rounds of those before it, and slack_s, leave over; it is cut off there. rounds, facts: of
    those that were measured. failed: reasons by name, of those that raised; cut_off: names that were started, and had no
    whole round; unreached: names that were not started.
    """

    def __init__(
        self,
        start: Callable[[str], Contender],
        number: int,
        budget_s: float,
        clock: Callable[[], float] = time.monotonic,
        limit: Callable[[float], AbstractContextManager[None]] = within,
        slack_s: float = SLACK_S,
    ) -> None:
        self._start, self._number, self._clock, self._limit = start, number, clock, limit
        self._slack_s = slack_s
        self._end = clock() + budget_s
        self._running: dict[str, Contender] = {}
        self._took: dict[str, float] = {}  # seconds of the first round
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.cut_off: list[str] = []
        self.unreached: list[str] = []

    def measure(self, names: list[str]) -> Generator[str]:
        """Everybody once a round; yields who had a turn. At the end, or when it is left, all contenders are closed."""
        try:
            for number in range(self._number):
                for name in [name for name in names if name in self._running or not number]:
                    later = 0.0 if number else (self._number - 1) * sum(self._took.values()) + self._slack_s
                    self._turn(name, later)
                    yield name
        finally:
            self.unreached = [name for name in names if self.outcome(name) == "not reached"]
            for contender in self._running.values():
                contender.close()

    def outcome(self, name: str) -> str:
        """How far a contender came."""
        if name in self.failed:
            return f"failed: {self.failed[name]}"
        return "measured" if name in self.rounds else "cut off" if name in self.cut_off else "not reached"

    def _turn(self, name: str, reserved: float) -> None:
        reason, left = None, self._end - self._clock() - reserved
        try:
            if left > 0:
                with self._limit(left):
                    self._measure(name)
        except (OutOfTime, KeyboardInterrupt) as end:
            if name not in self.rounds:
                self.cut_off.append(name)
            if isinstance(end, KeyboardInterrupt):
                raise
        except Exception as error:  # whatever it is, the others go on
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if type(error).__name__ == "OutOfMemoryError":
                reason += f" (beside {len(self._running.keys() - {name})} other contenders)"
        if reason is not None:
            self.failed[name] = reason
            for found in (self.rounds, self.facts, self._took):
                found.pop(name, None)
        if name not in self.rounds and name in self._running:
            self._running.pop(name).close()

    def _measure(self, name: str) -> None:
        if name not in self._running:
            self._running[name] = self._start(name)
        begun = self._clock()
        found = self._running[name].round()
        self.facts[name] = self._running[name].facts
        self.rounds.setdefault(name, []).append(found)
        self._took.setdefault(name, self._clock() - begun)
