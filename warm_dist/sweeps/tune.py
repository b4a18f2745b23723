"""Runs a sweep's trials on Ray Tune.

OUTPUT/sweep.json holds the sweep's id and trials, OUTPUT/trials/NAME/ a trial's run, ended.json there how it ended.
Tune's own state is not kept: a resume gives Tune the trials that have not ended, and ASHA the results of the others.
"""

from __future__ import annotations

import logging
import secrets
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from warm_dist.config.sweep import SweepConfig
from warm_dist.errors import Stopped, WarmDistError
from warm_dist.sweeps.ray_cluster import check_resources, connected
from warm_dist.sweeps.record import RECORD, Ended, Sweep, SweepRecord
from warm_dist.sweeps.trial_process import SweepPaths, patiently
from warm_dist.sweeps.trials import Trial


def run(
    sweep: SweepConfig, pending: list[Trial], paths: SweepPaths, record: SweepRecord, say: Callable[[str], None]
) -> None:
    """Train the pending trials until each has ended.

    Raises Stopped after Ctrl-C, what the store raises if a trial's end cannot be stored, and what `connected` and
    `check_resources` raise.
    """
    with connected(sweep, say) as ray, tempfile.TemporaryDirectory(prefix="warm-dist-tune-") as scratch:
        check_resources(ray, sweep, say)
        from ray import tune
        from ray.tune.execution import class_cache

        from warm_dist.sweeps.actors import ActorJob, TrialActor

        # Tune would send them through Ray, which logs them; each machine has its own
        secret = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
        class_cache.ENV_VARS_TO_PROPAGATE = class_cache.ENV_VARS_TO_PROPAGATE - secret
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # `_watch` reports errors in one line each
        trials = {trial.name: trial for trial in pending}
        job = ActorJob(trials, paths, sweep.trial, secrets.token_hex(8))
        scheduler = _scheduler(sweep, pending, record)
        strategy = "STRICT_SPREAD" if sweep.trial.nodes > 1 else "PACK"
        bundles = tune.PlacementGroupFactory([sweep.trial.bundle] * sweep.trial.nodes, strategy=strategy)
        watch = _watch(record, say)
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
        tuner.fit()
        if watch.failure is not None:
            raise watch.failure
    left = [name for name in trials if record.ended(name) is None]
    if left:
        raise Stopped(f"stopped with {len(left)} trials not ended; the same command with --resume continues")


def _scheduler(sweep: SweepConfig, pending: list[Trial], record: SweepRecord) -> Any:
    """ASHA, given the results of the trials that have ended; None without a scheduler."""
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
    known = record.read(RECORD, Sweep)
    for name in known.trials if known else ():
        if name not in waiting:
            past = SimpleNamespace(trial_id=name)  # the only attribute that ASHA reads
            asha.on_trial_add(None, past)
            for evaluation in record.evaluations(name):
                asha.on_trial_result(None, past, {"nimg": evaluation["nimg"], "frechet": evaluation["frechet"]})
    return asha


def _watch(record: SweepRecord, say: Callable[[str], None]) -> Any:
    """A Tune callback that prints each trial's progress and records how it ended."""
    from ray import tune

    begun = time.monotonic()

    class Watch(tune.Callback):  # type: ignore[misc]  # ray's are untyped
        """failure: of the store; it ends the sweep as Ctrl-C would."""

        failure: WarmDistError | None = None

        def __reduce__(self) -> tuple[Any, tuple[()]]:
            """Pickle as an empty callback: Tune saves its state for a restore that is never used."""
            return tune.Callback, ()

        def _say(self, trial: Any, text: str) -> None:
            seconds = int(time.monotonic() - begun)
            say(f"{seconds // 60:4d}:{seconds % 60:02d}  {trial.config['trial']}  {text}")

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._say(trial, "starts")

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            if "frechet" in result:
                self._say(trial, f"nimg {result['nimg']:,}  Fréchet {result['frechet']:.2f}")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            last = trial.last_result
            self._end(trial, last.get("state", "stopped"), last.get("reason", ""))

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._say(trial, f"crashed ({_reason(trial)}); restarts from its last checkpoint")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "failed", _reason(trial))

        def _end(self, trial: Any, state: str, reason: str) -> None:
            name = trial.config["trial"]

            def write() -> None:
                nimg = max((evaluation["nimg"] for evaluation in record.evaluations(name)), default=0)
                record.end(name, Ended.model_validate({"state": state, "reason": reason, "nimg": nimg}))

            try:
                patiently(write)
            except WarmDistError as error:  # Tune would count it as the trial's error
                self.failure = error
                signal.raise_signal(signal.SIGINT)
            self._say(trial, state + (f": {reason}" if reason else ""))

    return Watch()


def _reason(trial: Any) -> str:
    """The last failure in one line, from the file where Tune keeps it."""
    from ray import cloudpickle

    if trial.pickled_error_file is None:
        return "no reason given"
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    error = getattr(error, "cause", None) or error
    kind = "" if type(error).__name__ == "TrialFailed" else f"{type(error).__name__}: "
    return kind + (str(error).strip().splitlines() or ["no reason given"])[0][:300]
