"""A sweep: trials on Ray Tune, each the training command; what stands in its output is all that a resume needs.

OUTPUT/sweep.json names the sweep and its trials, OUTPUT/trials/NAME/ is a trial's run, ended.json there how it ended.
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
from warm_dist.sweeps.record import RECORD, Ended, SweepRecord
from warm_dist.sweeps.trial_process import SweepPaths, patiently
from warm_dist.sweeps.trials import Trial


def run(
    sweep: SweepConfig,
    pending: list[Trial],
    place: SweepPaths,
    ledger: SweepRecord,
    say: Callable[[str], None],
) -> None:
    """Train the pending trials until each has ended.

    Raises Stopped after Ctrl-C, what the output's store raises when a trial's end cannot be written down, and what
    `connected` and `check_resources` raise.
    """
    with connected(sweep, say) as ray, tempfile.TemporaryDirectory(prefix="warm-dist-tune-") as scratch:
        check_resources(ray, sweep, say)
        from ray import tune

        from warm_dist.sweeps.actors import ActorJob, TrialActor

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # tracebacks of what `_watch` tells in a line
        trials = {trial.name: trial for trial in pending}
        job = ActorJob(trials, place, sweep.trial, secrets.token_hex(8))
        scheduler = _scheduler(sweep, pending, ledger)
        bundles = tune.PlacementGroupFactory(
            [sweep.trial.bundle] * sweep.trial.nodes, strategy="STRICT_SPREAD" if sweep.trial.nodes > 1 else "PACK"
        )
        watch = _watch(ledger, say)
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
    left = [name for name in trials if ledger.ended(name) is None]
    if left:
        raise Stopped(f"stopped with {len(left)} trials not ended; the same command with --resume goes on")


def _scheduler(sweep: SweepConfig, pending: list[Trial], ledger: SweepRecord) -> Any:
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


def _watch(ledger: SweepRecord, say: Callable[[str], None]) -> Any:
    """Tune's callback: tells of each trial, and writes down how it ended."""
    from ray import tune

    begun = time.monotonic()

    class Watch(tune.Callback):  # type: ignore[misc]  # ray's are untyped
        """Tells and records. failure: of the store; it ends the sweep as Ctrl-C would."""

        failure: WarmDistError | None = None

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

            try:
                patiently(write)
            except WarmDistError as error:  # Tune would take it for the trial's
                self.failure = error
                signal.raise_signal(signal.SIGINT)
            self._say(trial, state + (f": {reason}" if reason else ""))

    return Watch()


def _reason(trial: Any) -> str:
    """The last failure, in one line, from the file that Tune has just written for its own use."""
    from ray import cloudpickle

    if trial.pickled_error_file is None:
        return "no reason given"
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    error = getattr(error, "cause", None) or error
    kind = "" if type(error).__name__ == "TrialFailed" else f"{type(error).__name__}: "
    return kind + (str(error).strip().splitlines() or ["no reason given"])[0][:300]
