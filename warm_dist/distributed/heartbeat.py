"""Heartbeats: each rank reports its phase; when a collective fails, they tell which rank to blame."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

from warm_dist import supervisor
from warm_dist.distributed.stop import PATIENCE_S, StopSignal
from warm_dist.distributed.world import World, beat_key, connect, master_address
from warm_dist.errors import EXIT_UNEXPECTED, PeerError, WarmDistError, kind_of

PHASES = ("start", "restore", "ema", "flags", "metrics", "save", "evaluate", "data", "forward", "backward", "update")
"""Phases of a rank at one nimg, in order (the update ends a step and raises nimg): an earlier phase is behind."""
NEWS_RANKS = 64  # with more ranks each reads the beats, some 200 bytes a rank, less often, to spare rank 0
_BEAT: dict[str, Any] = {"host": str, "place": str, "nimg": int, "held_s": int | float, "end": dict}
_END = {"reason": str, "code": int, "resumable": bool, "blames_a_peer": bool}
_PLURAL = {"is": "are", "has been": "have been"}


@dataclass(frozen=True)
class Beat:
    """A rank's last heartbeat, and when this rank received it (monotonic seconds: clocks are never compared)."""

    raw: bytes = b""
    heard: float = field(default_factory=time.monotonic)
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.heard

    @property
    def held_s(self) -> float:
        """Seconds since the rank entered its phase."""
        return float(self.told.get("held_s", 0.0)) + self.age_s

    @property
    def host(self) -> str:
        return str(self.told.get("host", "unknown"))

    @property
    def where(self) -> str:
        return f"'{self.told.get('place', 'start')}' of nimg {self.told.get('nimg', 0)}"

    @property
    def progress(self) -> tuple[int, int]:
        phase = self.told.get("place", "start")
        return self.told.get("nimg", 0), PHASES.index(phase) if phase in PHASES else len(PHASES)


class Heartbeat:
    """`with Heartbeat(…) as heartbeat:` around a run, `heartbeat.at(phase, nimg)` in it.

    Every `interval_s` one thread writes RUN/heartbeat/rank_K.json and checks what should stop the run: the preemption
    file, or the end of the `deepspeed` command. Another exchanges beats with the other ranks over its own connection to
    the rendezvous store, whatever the main thread does. facts: numbers for the file, to be set freely.
    """

    def __init__(
        self, world: World, run: Path, timeout_s: float, stop: StopSignal, preemption_file: str | None = None
    ) -> None:
        self.world, self.stop, self.preemption_file = world, stop, preemption_file
        self.path = run / "heartbeat" / f"rank_{world.rank}.json"
        self.interval_s = min(2.0, timeout_s / 10)
        self.silent_s = 3 * self.interval_s
        self.facts: dict[str, Any] = {}
        self.host = socket.gethostname()
        self.beats = [Beat() for _ in range(world.size)]
        self._now = ("start", 0, time.monotonic())
        self._answered = time.monotonic()
        self._end: dict[str, Any] | None = None
        self._blames_a_peer = self._curious = False
        self._closing, self._wake = threading.Event(), threading.Event()
        self._runner = deepspeed_runner()
        duties = [self._watch, self._talk] if world.size > 1 else [self._watch]
        self._threads = [threading.Thread(target=self._do, args=(duty,), daemon=True) for duty in duties]

    def at(self, phase: str, nimg: int) -> None:
        """Set this rank's phase. A single assignment, cheap enough for the inner loop."""
        self._now = (phase, nimg, time.monotonic())

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Send a last beat with the reason, so that no rank waits for this one or calls it silent."""
        self._end = {
            "reason": "finished" if error is None else f"{kind_of(error)}: {error}",
            "code": error.exit_code if isinstance(error, WarmDistError) else EXIT_UNEXPECTED if error else 0,
            "resumable": isinstance(error, WarmDistError) and error.resumable,
            "blames_a_peer": self._blames_a_peer or isinstance(error, PeerError),
        }
        self._closing.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self.interval_s)  # a daemon that hangs on a dead store or disk is left behind

    def silence_s(self) -> float:
        """Longest time without a beat, seconds, among the other ranks that have not ended."""
        return max((self.beats[rank].age_s for rank in self._others() if not self._ended(rank)), default=0.0)

    def _do(self, duty: Callable[[], None]) -> None:
        """Run a thread's duty; a surprise in it ends the run resumably, instead of the duty alone."""
        try:
            duty()
        except Exception as error:
            self.stop.name = (
                self.stop.name or f"the end of {duty.__name__.strip('_')} ({type(error).__name__}: {error})"
            )

    def _watch(self) -> None:
        with suppress(OSError):
            if self.world.is_main:  # remove files of an earlier attempt with more ranks
                for old in self.path.parent.glob("rank_*.json"):
                    number = re.fullmatch(r"rank_(\d{1,9})", old.stem)
                    if number and int(number[1]) >= self.world.size:
                        old.unlink(missing_ok=True)
        while True:
            last = self._closing.is_set()
            with suppress(OSError):  # a full disk must not end the run
                self._write("ended" if last else self._now[0])
            if last:
                return
            if (reason := self._reason_to_stop()) and self.stop.name is None:  # never None over a signal's name
                self.stop.name = reason
            self._closing.wait(self.interval_s)

    def _write(self, phase: str) -> None:
        _, nimg, entered = self._now
        now = time.time()
        tree = {
            "time": round(now, 3),
            "pid": os.getpid(),
            "host": self.host,
            "rank": self.world.rank,
            "nimg": nimg,
            "place": phase,
            "since": round(now - (time.monotonic() - entered), 3),
            "facts": dict(self.facts),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}")  # only this rank writes it
        try:
            temporary.write_text(json.dumps(tree) + "\n", encoding="utf-8")
            temporary.replace(self.path)
        finally:  # on a full disk
            temporary.unlink(missing_ok=True)

    def _reason_to_stop(self) -> str | None:
        if self.preemption_file is not None and os.path.exists(self.preemption_file):
            return f"parallel.preemption_file {self.preemption_file} (remove it before the next start)"
        if self._runner and not supervisor.alive(self._runner):
            return f"the end of the deepspeed command (pid {self._runner.partition(':')[0]})"
        return None

    def _talk(self) -> None:
        every, count = max(1, self.world.size // NEWS_RANKS), 0
        keys = [beat_key(rank) for rank in range(self.world.size)]
        store = None
        while True:
            last = self._closing.is_set()
            try:
                if store is None:
                    store = connect(timedelta(seconds=self.silent_s))
                phase, nimg, entered = self._now
                beat = {"host": self.host, "place": phase, "nimg": nimg, "held_s": time.monotonic() - entered}
                beat |= {"count": count, "end": self._end if last else None}
                store.set(keys[self.world.rank], json.dumps(beat))
                if self._curious or count % every == 0:
                    values = store.multi_get(keys)
                    self._answered = now = time.monotonic()
                    for rank, raw in enumerate(values):
                        if raw != self.beats[rank].raw:
                            self.beats[rank] = Beat(raw, now, _told(raw))
            except RuntimeError:
                pass  # the store is gone or does not answer, which `_answered` shows
            if last:
                return
            count += 1
            self._wake.wait(self.interval_s)
            if self._curious:
                self._closing.wait(self.interval_s / 8)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world.size) if rank != self.world.rank]

    def _ended(self, rank: int) -> bool:
        return self.beats[rank].told.get("end") is not None

    def _silent(self, rank: int) -> bool:
        """Whether the rank was silent while the store still answered: the store ends with rank 0."""
        return not self._ended(rank) and self._answered - self.beats[rank].heard > self.silent_s

    def _store_is_lost(self) -> bool:
        return time.monotonic() - self._answered > self.silent_s

    def peers_end(self) -> PeerError | None:
        """Another rank's failure from its last beat, as an error; None if none failed by its own fault so far."""
        for rank in self._others():
            end = self.beats[rank].told.get("end")
            if end and end["code"] and not end["blames_a_peer"]:
                return PeerError(end["reason"], end["code"], end["resumable"])
        return None

    def hindrance(self) -> str | None:
        """For whom a stop waits in vain: a rank that gives no sign of life, or one whose batch does not come."""
        self._curious = True
        self._wake.set()
        self.silent_s = max(PATIENCE_S, 2 * self.interval_s)
        # while it writes a checkpoint, a rank may be too busy to beat
        silent_s = 5 * self.silent_s if self._now[0] == "save" else self.silent_s
        for rank in filter(lambda rank: not self._ended(rank), self._others()):
            beat = self.beats[rank]
            if beat.age_s > silent_s:
                return (
                    f"waiting for rank {rank} (host {beat.host}), silent for {beat.age_s:.0f} s, last at {beat.where}"
                )
            if beat.told.get("place") == "data" and beat.held_s > PATIENCE_S:
                return f"rank {rank} (host {beat.host}) waits for {beat.held_s:.0f} s for its batch"
        return None

    def speaks(self) -> bool:
        """Whether this rank prints messages: the lowest one left, on its host if the store is lost."""
        near = [rank for rank in self._others() if not self._silent(rank)]
        if self._store_is_lost():
            near = [rank for rank in near if rank and self.beats[rank].host == self.host]
        return self.world.rank < min(near, default=self.world.size)

    def diagnose(self, error: BaseException, told: Callable[[], bool] = lambda: False) -> str:
        """Say which rank is to blame for a failed collective, and where this rank waited.

        Listens for three more intervals (7 s at most), so that even a rank killed just now is found silent; less if
        told() becomes true (another rank has said why), or if this rank waited so long that the answer is clear.
        """
        phase, nimg, entered = self._now
        waited = time.monotonic() - entered
        behind = self._behind()
        self._blames_a_peer = self._curious = True
        self._wake.set()
        deadline = time.monotonic() + self.silent_s + self.interval_s / 2
        long = waited > self.silent_s + 2 * self.interval_s
        while time.monotonic() < deadline and not told():
            if long and (behind or self._silence() or self._store_fault()):
                break
            time.sleep(min(0.1, self.interval_s / 10))
        mine = f"rank {self.world.rank} (host {self.host}) waited at '{phase}' of nimg {nimg} for {waited:.0f} s"
        fault = self._silence() or self._store_fault() or behind or f"every rank answers ({str(error).splitlines()[0]})"
        return f"{fault}; {mine}; run the same command again to resume, with fewer nodes if necessary"

    def _store_fault(self) -> str:
        if not self._store_is_lost():
            return ""
        first = self.beats[0]
        return (
            f"rank 0 (host {first.host}) or the link to it is gone: {master_address()} has not answered for "
            f"{time.monotonic() - self._answered:.0f} s, rank 0 was last at {first.where}"
        )

    def _silence(self) -> str:
        silent = [rank for rank in self._others() if self._silent(rank)]
        return self._list(silent, "has been", lambda beat: f"silent for {beat.age_s:.0f} s, last at {beat.where}")

    def _behind(self) -> str:
        """The living ranks that the others wait for: those with the least progress that have not moved for a while."""
        phase, nimg, _ = self._now
        mine = Beat(told={"place": phase, "nimg": nimg}).progress
        stuck = [r for r in self._others() if not self._ended(r) and self.beats[r].held_s > self.silent_s]
        least = min((self.beats[rank].progress for rank in stuck), default=mine)
        late = [rank for rank in stuck if self.beats[rank].progress == least] if least < mine else []
        return self._list(late, "is", lambda beat: f"at {beat.where} for {beat.held_s:.0f} s, and alive")

    def _list(self, ranks: Iterable[int], verb: str, describe: Callable[[Beat], str]) -> str:
        """`ranks 2, 3 (host node3) VERB …`: consecutive ranks on one host and in one phase together."""
        parts = []
        for (host, _), group in groupby(ranks, lambda rank: (self.beats[rank].host, self.beats[rank].where)):
            members = list(group)
            noun, does = ("rank", verb) if len(members) == 1 else ("ranks", _PLURAL[verb])
            names = f"{noun} {', '.join(map(str, members))} (host {host})"
            parts.append(f"{names} {does} {describe(self.beats[members[0]])}")
        return " and ".join(parts)


def _told(raw: bytes) -> dict[str, Any]:
    """What a beat says; another program's garbage says nothing."""
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(tree, dict):
        return {}
    told = {key: value for key, value in tree.items() if isinstance(value, _BEAT.get(key, ()))}
    if told.keys() & {"end"} and {key: type(value) for key, value in told["end"].items()} != _END:
        del told["end"]
    return told


def deepspeed_runner() -> str:
    """The identity of the `deepspeed` command that started this rank's launch.py, empty if there is none.

    Killed, it leaves launch.py alive, and the kernel reports only the end of a process's direct parent. If it was
    killed before this rank began, the identity is of no process.
    """
    import psutil

    with suppress(psutil.Error):
        launch = psutil.Process(os.getppid())
        words = launch.cmdline()
        if "deepspeed.launcher.launch" in words:
            runner = psutil.Process(launch.ppid())
            names = {Path(word).name for word in runner.cmdline()}
            if names & {"deepspeed", "deepspeed.launcher.runner"}:
                return supervisor.identity(runner.pid)
            return f"{runner.pid}:gone" if _is_local(words) else ""  # elsewhere ssh or pdsh starts launch.py
    return ""


def _is_local(words: list[str]) -> bool:
    """Whether launch.py's command line says that it is of this machine alone, which the runner starts itself."""
    world = next((word.partition("=")[2] for word in words if word.startswith("--world_info=")), "")
    with suppress(ValueError, TypeError):
        return list(json.loads(base64.urlsafe_b64decode(world))) == ["localhost"]
    return False
