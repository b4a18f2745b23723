"""A sweep on Ray Tune: `python launch/sweep.py --config configs/sweep_bnr.json`, every trial the training command.

It starts Ray on this machine, or joins the cluster of RAY_ADDRESS. All trials are checked before anything starts. Killed,
stopped or on another cluster, the same command with --resume goes on; what has ended is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from launch.services import claimed
from warm_dist import errors, supervisor
from warm_dist.config.sweep import SweepConfig, load_sweep, parameters
from warm_dist.errors import AccessError, OutputError, Stopped
from warm_dist.space import Trial, trials
from warm_dist.store.open import open_store
from warm_dist.trial import Place, make_place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file configs/sweep_*.json")
    text = "override a key of the sweep (output, trial.max_failures, …) or of its trials (data.endpoint_url, …); repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help=text)
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in output")
    parser.add_argument("--retry-failed", action="store_true", help="with --resume: run failed trials again, too")
    parser.add_argument("--dry-run", action="store_true", help="list the trials, validated; stop")
    parser.add_argument("--driver", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.retry_failed and not args.resume:
        parser.error("--retry-failed goes with --resume")
    if not (args.dry_run or args.driver):  # the driver under a supervisor: Ray's helpers may outlive it by a minute
        return supervisor.run([sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--driver"])
    try:
        return drive(args)
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command with --resume goes on") from None


def drive(args: argparse.Namespace) -> int:
    """All of the command; its exit code."""
    sweep, base = load_sweep(args.config, args.set)
    every = trials(sweep, base)
    if args.dry_run:
        print(describe(sweep, every))
        return errors.EXIT_OK
    place = make_place(sweep, "", None)
    with contextlib.nullcontext() if place.remote else claimed(Path(place.output), "sweep"):
        return Session(sweep, every, place).run(args.resume, args.retry_failed)


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

    def __init__(self, sweep: SweepConfig, every: list[Trial], place: Place) -> None:
        from warm_dist.ledger import Ledger

        self.sweep, self.every = sweep, every
        self.ledger = Ledger(open_store(place.output, place.endpoint_url if place.remote else None))

    def run(self, resume: bool, retry_failed: bool) -> int:
        """Train what has not ended, and report; the exit code. Raises Stopped after the report so far, when interrupted."""
        from launch.sweep_report import Report
        from warm_dist import sweep

        record = self.ledger.claim(self.every, resume)
        if resume and not record["trials"]:
            say(f"sweep: there is none in {self.ledger.store.url} yet; this begins one")
        record["parent_run_id"] = record["parent_run_id"] or self._parent(record["id"])
        self.ledger.keep(record, self.every)
        place = make_place(self.sweep, record["id"], record["parent_run_id"])
        report = Report(self.sweep, self.every, place, self.ledger, say)
        pending = self._pending(retry_failed)
        stopped = None
        if pending:
            try:
                sweep.run(self.sweep, pending, place, self.ledger, open_store, say)
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


if __name__ == "__main__":
    errors.run(main)
