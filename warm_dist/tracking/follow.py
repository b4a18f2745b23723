"""Copies a run's metrics.jsonl to MLflow as it grows, through outages, until the run or its owner ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from warm_dist import supervisor
from warm_dist.config.run import TrackingConfig
from warm_dist.errors import AccessError, ConfigError, OutputError, Stopped, UnreachableError, redact, tell
from warm_dist.files import locked
from warm_dist.runs.folder import EXIT, LOCK, METRICS, attempt_of, read_config, read_end
from warm_dist.runs.metrics import read_metrics
from warm_dist.tracking.client import CLIENT_ENV, REFUSALS
from warm_dist.tracking.mirror import Mirror, SendModel
from warm_dist.tracking.model import send_model

POLL_S = 1.0
LONGEST_PAUSE_S = 30.0  # between attempts to reach a server that is down
LAST_TRIES = 3
EXIT_S = 5.0  # after the owner's end, for another rank to write exit.json
SILENCE_S = 60.0  # without a heartbeat, after which a run counts as dead
LOCK_S = 60.0  # to wait for another mirror of the run, which may be finishing


def start_mirror(run: Path) -> subprocess.Popen[bytes]:
    """Start `launch/mirror.py RUN --follow` for the calling process; its output goes to RUN/mirror.log.

    It gets its own session, so Ctrl-C does not reach it, and no supervisor, because it outlives its owner briefly.
    """
    owner = {supervisor.OWNER: supervisor.identity(os.getpid()), "OMP_NUM_THREADS": "1"}
    with (run / "mirror.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.mirror", str(run), "--follow"],
            env={**CLIENT_ENV, **os.environ, **owner},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def mirror_run(
    run: Path, url: str | None = None, register: str | None = None, owner: str | None = None, follow: bool = False
) -> None:
    """Send MLflow what is missing of a run; `follow`: keep sending until the run or its `owner` ends.

    url: used instead of tracking.mlflow_url. register: name of the registered model that gets the weights as a version.
    owner: a process as `supervisor.identity` names it. Raises ConfigError if `run` is not a run's folder or no server is
    given, OutputError, UnreachableError, AccessError.
    """
    tracking = _tracking(run)
    url = tracking.mlflow_url if url is None else url
    if not url:
        raise ConfigError(f"{run}: its tracking.mlflow_url is null; name a server with --url")
    if (run / METRICS).exists() and not (run / METRICS).is_file():
        raise OutputError(f"{run / METRICS}: is no file; move it away")
    mirror = Mirror(run, url, tracking.experiment, tracking.run_name, tracking.parent_run_id)
    register = register or tracking.registered_model
    model = partial(send_model, register=register) if tracking.log_model or register else None
    attempt = attempt_of(run)
    if owner:

        def heed(number: int, frame: object) -> None:
            if not supervisor.alive(owner):  # deepspeed's launcher and SLURM signal all descendants of a run
                raise Stopped(f"{signal.Signals(number).name}; python launch/mirror.py {run} sends the rest")

        for request in supervisor.REQUESTS:
            signal.signal(request, heed)
    with _only_mirror(run, owner):
        if follow:
            _follow(mirror, owner)
        _finish(mirror, attempt, owner, model)
    if not mirror.has_begun():
        _say(f"{run / METRICS} has no line yet, so nothing was sent")


def _follow(mirror: Mirror, owner: str | None) -> None:
    """Mirror until the run or its owner ends; a server that is down is retried after 2, 4, 8 … 30 s."""
    pause, trouble = POLL_S, ""
    while not _ended(mirror.run, owner):
        try:
            mirror.sync(running=True)
            if trouble:
                _say("MLflow answers again")
            pause, trouble = POLL_S, ""
        except REFUSALS as error:
            if not trouble:
                _say(f"{error}; the run continues, and the mirror keeps trying")
            pause, trouble = min(2 * pause, LONGEST_PAUSE_S), str(error)
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline and not _ended(mirror.run, owner):
            time.sleep(POLL_S / 4)


def _finish(mirror: Mirror, attempt: int, owner: str | None, send_model: SendModel | None = None) -> None:
    """Send everything, and the run's end if it has ended. Raises UnreachableError with the command to catch up."""
    deadline = time.monotonic() + EXIT_S
    while owner and not _ended(mirror.run, None) and time.monotonic() < deadline:
        time.sleep(POLL_S / 4)
    for number in range(1, LAST_TRIES + 1):
        try:
            end = _end(mirror.run, attempt, owner)
            if end:
                mirror.finish(*end, lambda: _curves(mirror.run), send_model)
            else:
                mirror.sync(running=False)
            return
        except UnreachableError as error:
            if number == LAST_TRIES or attempt_of(mirror.run) > attempt:  # the next attempt's mirror waits for us
                raise UnreachableError(
                    f"{error}; metrics.jsonl has everything: when the server is back, python launch/mirror.py {mirror.run}"
                ) from None
            time.sleep(number)
        except AccessError as error:
            raise AccessError(
                f"{error}; metrics.jsonl has everything: then python launch/mirror.py {mirror.run}"
            ) from None


def _curves(run: Path) -> list[Path]:
    from warm_dist.tracking.curve import loss_curve

    try:
        loss_curve(read_metrics(run / METRICS), run / "curves.png")
    except OutputError as error:  # on a full disk the run's end is still sent
        _say(str(error))
        return []
    return [run / "curves.png"]


def _end(run: Path, attempt: int, owner: str | None) -> tuple[str, dict[str, str], float] | None:
    """Status, tags and time of the run's end, or None if it is not known to have ended."""
    end = read_end(run, attempt=attempt_of(run))
    if end:
        status = {0: "FINISHED", 75: "KILLED"}.get(end.code, "FAILED")
        tags = {"exit.code": str(end.code), "exit.reason": end.reason}
        return status, tags, (run / EXIT).stat().st_mtime
    gone = not supervisor.alive(owner) if owner else _abandoned(run)
    if gone and attempt_of(run) == attempt:
        return "KILLED", {"exit.reason": "the process ended without an exit.json"}, time.time()
    return None


def _ended(run: Path, owner: str | None) -> bool:
    return read_end(run, attempt=attempt_of(run)) is not None or (owner is not None and not supervisor.alive(owner))


def _abandoned(run: Path) -> bool:
    """Whether the lock is free and rank 0's heartbeat silent, so the run must be dead; False if either is missing."""
    try:
        silent_s = time.time() - (run / "heartbeat" / "rank_0.json").stat().st_mtime
        if not (run / LOCK).exists():
            return False
        locked(run / LOCK).close()
    except OSError:
        return False
    return silent_s > SILENCE_S


def _tracking(run: Path) -> TrackingConfig:
    config = read_config(run)
    if config is None:
        raise ConfigError(
            f"{run}: its config.json is missing, unreadable or changed; RUN is the folder that the config calls output"
        )
    try:
        return TrackingConfig.model_validate(redact(config.get("tracking", {})))  # an old one may hold credentials
    except ValueError as error:
        raise ConfigError(f"{run / 'config.json'}: its tracking section is not valid: {error}") from None


@contextlib.contextmanager
def _only_mirror(run: Path, owner: str | None = None) -> Iterator[None]:
    """Hold the mirror's lock. A new attempt's mirror waits for the previous one, whose request may hang."""
    deadline, lock = time.monotonic() + LOCK_S, None
    while lock is None:
        try:
            lock = locked(run / "mirror.lock", POLL_S)
        except BlockingIOError:
            if time.monotonic() > deadline and not (owner and supervisor.alive(owner)):
                raise OutputError(f"{run}: another mirror is running, as it does while a run trains") from None
        except OSError as error:
            raise OutputError(f"{run / 'mirror.lock'}: cannot be locked ({error.strerror or error})") from None
    with lock:
        yield


def _say(text: str) -> None:
    tell(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
