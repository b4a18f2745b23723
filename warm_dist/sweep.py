"""A sweep: trials on Ray Tune, each the training command; what stands in its output is all that a resume needs.

OUTPUT/sweep.json names the sweep and its trials, OUTPUT/trials/NAME/ is a trial's run, ended.json there how it ended.
Tune's own state is not kept: a resume gives Tune the trials that have not ended, and ASHA the results of the others.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from warm_dist.bnr import exact
from warm_dist.errors import ConfigError, DataError, Stopped, UnreachableError
from warm_dist.metrics import parse_records
from warm_dist.space import Trial
from warm_dist.sweep_config import SweepConfig
from warm_dist.trial import Place, patiently
from warm_dist.types import OpenStore, Store

RECORD = "sweep.json"
_ENVIRONMENT = {  # read when ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one draws boxes even when it is told to be quiet
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # results are in metrics.jsonl
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a step without an evaluation has no distance
}
_LOCAL = {  # for a Ray of our own, which is for this machine
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only: named after the systems where that is the default
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # else 15, and training would have it from its worker
}
# One try, in which a head that does not answer has 40 s, not 20 tries (that is what the number means there: a refused
# token would be tried for 20 s, an address where nobody listens for 14 minutes).
_JOINED = {"RAY_gcs_server_port_wait_time_s": "1"}
_OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes; nothing large travels


@dataclass(frozen=True)
class Ended:
    """How a trial ended: state "finished", "stopped" (by the scheduler) or "failed", why, and how far it was."""

    state: str
    reason: str
    nimg: int


class Ledger:
    """What the output knows of the sweep: who it is, and which trials have ended. Each file is replaced as a whole."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def read(self, path: str) -> Any:
        """A JSON file of the output, None where there is none. Raises what the store raises, DataError if it is no JSON."""
        try:
            data = self.store.read(path)
        except DataError:
            return None
        try:
            return json.loads(data)
        except ValueError:
            raise DataError(f"{self.store.url}/{path}: is no JSON") from None

    def write(self, path: str, tree: Any) -> None:
        """Replace a JSON file of the output."""
        self.store.write(path, (json.dumps(tree, indent=2) + "\n").encode())

    def claim(self, trials: list[Trial], resume: bool) -> dict[str, Any]:
        """The sweep's record, made or, with `resume`, found. Raises ConfigError for a sweep of other trials."""
        record, url = self.read(RECORD), self.store.url
        if record is None:
            return {"id": secrets.token_hex(8), "trials": {}, "parent_run_id": None}
        if not self.store.list("trials/"):  # a start that came to nothing, since Ray did not answer, say
            return dict(record)
        if not resume:
            raise ConfigError(f"{url}: holds a sweep already; --resume goes on with it, or set output elsewhere")
        names = {trial.name for trial in trials}
        strangers = [name for name in record["trials"] if name not in names]
        if strangers:
            raise ConfigError(
                f"{url}: holds a sweep of other trials ({strangers[0]} is not among those of this config); set output "
                "elsewhere, or undo what changed. Only to add seeds, values and draws is to go on"
            )
        return dict(record)

    def keep(self, record: dict[str, Any], trials: list[Trial]) -> None:
        """Write the record with all trials."""
        record["trials"] = {trial.name: {"values": trial.values, "seed": trial.seed} for trial in trials}
        self.write(RECORD, record)

    def ended(self, name: str) -> Ended | None:
        """How a trial ended, None if it has not."""
        found = self.read(f"trials/{name}/ended.json")
        return Ended(**found) if found else None

    def end(self, name: str, ended: Ended) -> None:
        """Write down that a trial has ended."""
        self.write(f"trials/{name}/ended.json", vars(ended))

    def forget(self, name: str) -> None:
        """Let a trial be run again."""
        self.store.delete(f"trials/{name}/ended.json")

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """A trial's, by rising nimg, none if it has none yet."""
        try:
            text = self.store.read(f"trials/{name}/metrics.jsonl").decode("utf-8", "replace")
        except DataError:
            return []
        return [record for record in parse_records(text) if record["kind"] == "eval"]


def run(
    sweep: SweepConfig,
    pending: list[Trial],
    place: Place,
    ledger: Ledger,
    open_store: OpenStore,
    say: Callable[[str], None],
) -> None:
    """Train the pending trials until each has ended. Raises Stopped after Ctrl-C or SIGTERM, what `connected` raises."""
    with connected(sweep, say) as ray, tempfile.TemporaryDirectory(prefix="warm-dist-tune-") as scratch:
        _check_resources(ray, sweep, say)
        from ray import tune

        from warm_dist.sweep_actors import Job, TrialActor

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # tracebacks of what `_watch` tells in a line
        trials = {trial.name: trial for trial in pending}
        job = Job(trials, place, sweep.trial, secrets.token_hex(8), open_store)
        scheduler = _scheduler(sweep, pending, ledger)
        bundles = tune.PlacementGroupFactory(
            [sweep.trial.bundle] * sweep.trial.nodes, strategy="STRICT_SPREAD" if sweep.trial.nodes > 1 else "PACK"
        )
        watch = _watch(trials, ledger, say)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(TrialActor, job=job), bundles),
            param_space={"trial": tune.grid_search(list(trials))},
            tune_config=tune.TuneConfig(
                scheduler=scheduler,
                max_concurrent_trials=sweep.max_concurrent,
                reuse_actors=False,
                trial_name_creator=lambda trial: trial.config["trial"],
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=sweep.trial.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # Tune knows Ctrl-C
        tuner.fit()
    left = [name for name in trials if ledger.ended(name) is None]
    if left:
        raise Stopped(f"stopped with {len(left)} trials not ended; the same command with --resume goes on")


@contextmanager
def connected(sweep: SweepConfig, say: Callable[[str], None]) -> Iterator[Any]:
    """ray, connected to the cluster that the config or RAY_ADDRESS names, else to one of its own, which ends with us.

    Raises UnreachableError if the cluster does not answer or refuses the token.
    """
    address = sweep.ray_address or os.environ.get("RAY_ADDRESS")
    os.environ.update(_ENVIRONMENT)
    options: dict[str, Any] = {"address": address}
    if address:
        os.environ.update(_JOINED)
    else:
        os.environ.update(_LOCAL | {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
        options = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    import ray

    try:
        ray.init(**options, log_to_driver=False, logging_level="error", namespace="warm-dist")
    except Exception as error:  # it raises ConnectionError, RuntimeError, and kinds of its own
        raise UnreachableError(f"Ray at {address or 'this machine'}: {_cause(error)}") from None
    try:
        say(f"ray: {'joined ' + address if address else 'started on this machine, loopback only'}")
        yield ray
    finally:
        ray.shutdown()


def _cause(error: BaseException) -> str:
    """Why there is no Ray: the first sentence of what all began with, which may be told with its traceback, and a hint."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].split(". ")[0]
    if "No node info found" in reason:  # of a Ray whose processes it can see
        return "it has no node here; start the sweep on one of its machines, in the same container"
    if "AuthToken" in reason:
        return f"{reason}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as on its machines"
    return reason


def _check_resources(ray: Any, sweep: SweepConfig, say: Callable[[str], None]) -> None:
    """A trial that fits no machine would wait for ever, unless the cluster grows."""
    bundle, nodes = sweep.trial.bundle, [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = [node for node in nodes if all(node.get(kind, 0) >= amount for kind, amount in bundle.items())]
    wants = " and ".join(f"{exact(amount)} {kind}" for kind, amount in bundle.items())
    most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU")}
    have = f"{len(nodes)} machines, the largest with {exact(most['CPU'])} CPU and {exact(most['GPU'])} GPU"
    say(f"ray: a trial takes {wants} on {sweep.trial.nodes} of {have}")
    if len(fits) < sweep.trial.nodes:
        message = f"a trial needs {wants} on each of {sweep.trial.nodes} machines; Ray has {have}"
        if not (sweep.ray_address or os.environ.get("RAY_ADDRESS")):
            raise ConfigError(f"{message}; set trial.cpus_per_process, trial.gpus_per_process or trial.nodes lower")
        say(f"ray: {message}; trials wait until it grows")


def _scheduler(sweep: SweepConfig, pending: list[Trial], ledger: Ledger) -> Any:
    """None, or ASHA that remembers the trials which have ended."""
    from ray.tune.schedulers import ASHAScheduler

    if sweep.scheduler is None:
        return None
    asha = ASHAScheduler(
        time_attr="nimg",
        metric="frechet",
        mode="min",
        max_t=max(trial.config.train.total_nimg for trial in pending),
        grace_period=sweep.scheduler.grace_nimg,
        reduction_factor=sweep.scheduler.reduction_factor,
    )
    waiting = {trial.name for trial in pending}
    for name in (ledger.read(RECORD) or {"trials": {}})["trials"]:
        if name not in waiting:
            past = SimpleNamespace(trial_id=name)  # all that it asks of a trial
            asha.on_trial_add(None, past)
            for record in ledger.evaluations(name):
                asha.on_trial_result(None, past, {"nimg": record["nimg"], "frechet": record["frechet"]})
    return asha


def _watch(trials: dict[str, Trial], ledger: Ledger, say: Callable[[str], None]) -> Any:
    """Tune's callback: tells of each trial, and writes down how it ended."""
    from ray import tune

    begun = time.monotonic()

    class Watch(tune.Callback):  # type: ignore[misc]  # ray's are untyped
        """Tells and records."""

        def __reduce__(self) -> tuple[Any, tuple[()]]:
            """Tune pickles all that it has for a restore of its own, which nobody wants: there this is no callback."""
            return tune.Callback, ()

        def _say(self, trial: Any, text: str) -> None:
            seconds = int(time.monotonic() - begun)
            say(f"{seconds // 60:4d}:{seconds % 60:02d}  {trial.config['trial']}  {text}")

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._say(trial, "starts")

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            if "frechet" in result:
                self._say(trial, f"nimg {result['nimg']:,}  Fréchet {result['frechet']:.2f}")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            last = trial.last_result
            self._end(trial, last.get("state", "stopped"), last.get("reason", ""))

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._say(trial, f"crashed ({_reason(trial)}); starts again from its last checkpoint")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "failed", _reason(trial))

        def _end(self, trial: Any, state: str, reason: str) -> None:
            name = trial.config["trial"]

            def write() -> None:
                nimg = max((record["nimg"] for record in ledger.evaluations(name)), default=0)
                ledger.end(name, Ended(state, reason, nimg))

            patiently(write)
            self._say(trial, state + (f": {reason}" if reason else ""))

    return Watch()


def _reason(trial: Any) -> str:
    """The last failure, in one line, from the file that Tune has just written for its own use."""
    from ray import cloudpickle

    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    error = getattr(error, "cause", None) or error
    kind = "" if type(error).__name__ == "TrialFailed" else f"{type(error).__name__}: "
    return kind + (str(error).strip().splitlines() or ["no reason given"])[0][:300]
