"""One command's part in a sweep: claim its output, train what has not ended, report."""

from __future__ import annotations

import contextlib
from typing import Any

from warm_dist.config.sweep import SweepConfig, parameters
from warm_dist.errors import AccessError, OutputError, Stopped
from warm_dist.store.open import open_store
from warm_dist.sweeps.trial_process import SweepPaths, make_paths
from warm_dist.sweeps.trials import Trial


def describe(sweep: SweepConfig, every: list[Trial]) -> str:
    """The trials' names, and what they come to."""
    total = sum(trial.config.train.total_nimg for trial in every)
    size = f"{sweep.trial.processes} process{'es' * (sweep.trial.processes > 1)}"
    unless = "" if sweep.scheduler is None else ", less what ASHA stops"
    return "\n".join(
        [*(f"  {trial.name}" for trial in every), f"{_count(every)} of {size}, {total:,} images in all{unless}"]
    )


def _count(every: list[Trial]) -> str:
    return f"{len(every)} trial{'s' * (len(every) != 1)}"


class Session:
    """One command's part in a sweep: whose trials, what is left to do, and the report on all."""

    def __init__(self, sweep: SweepConfig, every: list[Trial], place: SweepPaths) -> None:
        from warm_dist.sweeps.record import SweepRecord

        self.sweep, self.every = sweep, every
        self.ledger = SweepRecord(open_store(place.output, place.endpoint_url if place.remote else None))

    def run(self, resume: bool, retry_failed: bool) -> int:
        """Train what has not ended, and report; the exit code. Raises Stopped after the report so far, when interrupted."""
        from warm_dist.sweeps import tune
        from warm_dist.sweeps.report import Report

        record = self.ledger.claim(self.every, resume)
        if resume and not record["trials"]:
            say(f"sweep: there is none in {self.ledger.store.url} yet; this begins one")
        record["parent_run_id"] = record["parent_run_id"] or self._parent(record["id"])
        self.ledger.keep(record, self.every)
        place = make_paths(self.sweep, record["id"], record["parent_run_id"])
        report = Report(self.sweep, self.every, place, self.ledger, say)
        pending = self._pending(retry_failed)
        stopped = None
        if pending:
            try:
                tune.run(self.sweep, pending, place, self.ledger, say)
            except (Stopped, AccessError, OutputError) as error:  # after some work: here is what came of it
                stopped = error
        code = report.write(whole=stopped is None)
        if stopped is not None:
            raise stopped
        return code

    def _pending(self, retry_failed: bool) -> list[Trial]:
        ended: dict[str, Any] = {trial.name: self.ledger.ended(trial.name) for trial in self.every}
        for name, end in ended.items():
            if retry_failed and end is not None and end.state == "failed":
                self.ledger.forget(name)
                ended[name] = None
        pending = [trial for trial in self.every if ended[trial.name] is None]
        say(f"sweep: {_count(self.every)}, {len(self.every) - len(pending)} have ended, in {self.ledger.store.url}")
        return pending

    def _parent(self, sweep_id: str) -> str | None:
        """MLflow's run of the sweep, under which its trials are shown; now, so that no trial is without."""
        tracking = self.every[0].config.tracking
        if not tracking.mlflow_url:
            return None
        from warm_dist.tracking.client import open_parent

        name = self.ledger.store.url.rpartition("/")[2]
        return open_parent(tracking.mlflow_url, tracking.experiment, name, sweep_id, parameters(self.sweep))


def say(text: str) -> None:
    """A line of progress."""
    with contextlib.suppress(OSError):  # whoever read our output is gone; the sweep goes on
        print(text, flush=True)
