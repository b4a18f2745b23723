"""One run of the sweep command: claim the output folder, train the pending trials, report."""

from __future__ import annotations

import contextlib

from warm_dist.config.sweep import SweepConfig, parameters
from warm_dist.errors import AccessError, OutputError, Stopped, tell
from warm_dist.store.open import open_store
from warm_dist.sweeps.trial_process import SweepPaths, make_paths
from warm_dist.sweeps.trials import Trial


def describe(sweep: SweepConfig, every: list[Trial]) -> str:
    """Lists the trials' names and their total cost in images."""
    total = sum(trial.config.train.total_nimg for trial in every)
    size = f"{sweep.trial.processes} process{'es' * (sweep.trial.processes > 1)}"
    unless = "" if sweep.scheduler is None else ", less what ASHA stops"
    names = [f"  {trial.name}" for trial in every]
    return "\n".join([*names, f"{_count(every)} of {size}, {total:,} images in all{unless}"])


def _count(every: list[Trial]) -> str:
    return f"{len(every)} trial{'s' * (len(every) != 1)}"


class Session:
    """Runs or resumes a sweep's trials and writes the report on all of them."""

    def __init__(self, sweep: SweepConfig, every: list[Trial], paths: SweepPaths) -> None:
        from warm_dist.sweeps.record import SweepRecord

        self.sweep, self.every = sweep, every
        self.record = SweepRecord(open_store(paths.output, paths.endpoint_url if paths.remote else None))

    def run(self, resume: bool, retry_failed: bool) -> int:
        """Train the pending trials, report, and return the exit code. If interrupted, report first, then raise Stopped."""
        from warm_dist.sweeps import tune
        from warm_dist.sweeps.report import Report

        state = self.record.claim(self.every, resume)
        if resume and not state.trials:
            say(f"sweep: nothing to resume in {self.record.store.url}; starting a new sweep")
        parent = state.parent_run_id or self._parent(state.id)
        self.record.keep(state.model_copy(update={"parent_run_id": parent}), self.every)
        paths = make_paths(self.sweep, state.id, parent)
        report = Report(self.sweep, self.every, paths, self.record, say)
        pending = self._pending(retry_failed)
        stopped = None
        if pending:
            try:
                tune.run(self.sweep, pending, paths, self.record, say)
            except (Stopped, AccessError, OutputError) as error:  # raised again after the report
                stopped = error
        code = report.write(whole=stopped is None)
        if stopped is not None:
            raise stopped
        return code

    def _pending(self, retry_failed: bool) -> list[Trial]:
        pending = []
        for trial in self.every:
            end = self.record.ended(trial.name)
            if retry_failed and end is not None and end.state == "failed":
                self.record.forget(trial.name)
                end = None
            if end is None:
                pending.append(trial)
            else:
                self.record.check(trial, end)
        say(f"sweep: {_count(self.every)}, {len(self.every) - len(pending)} have ended, in {self.record.store.url}")
        return pending

    def _parent(self, sweep_id: str) -> str | None:
        """The MLflow run that groups the trials, created before any of them starts."""
        tracking = self.every[0].config.tracking
        if not tracking.mlflow_url:
            return None
        from warm_dist.tracking.client import open_parent

        name = self.record.store.url.rpartition("/")[2]
        return open_parent(tracking.mlflow_url, tracking.experiment, name, sweep_id, parameters(self.sweep))


def say(text: str) -> None:
    """Print a line of progress."""
    with contextlib.suppress(OSError):  # the reader of our output is gone; the sweep goes on
        tell(text)
