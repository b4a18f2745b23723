"""A sweep's state in its output folder: its id and how each trial ended. Enough to resume."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from warm_dist.errors import ConfigError, DataError, MissingError
from warm_dist.records import DamagedError, R, Record, seal, unseal
from warm_dist.runs.folder import METRICS
from warm_dist.runs.metrics import parse_records
from warm_dist.store.base import Store
from warm_dist.sweeps.trials import Trial

RECORD = "sweep.json"


class Ended(Record):
    """How a trial ended: "finished", "stopped" (by the scheduler) or "failed", the reason, and its last nimg."""

    state: Literal["finished", "stopped", "failed"]
    reason: str
    nimg: Annotated[int, Field(ge=0)]


class Planned(Record):
    """A trial of a sweep: the values of its keys, and its seed."""

    values: dict[str, Any]
    seed: int


class Sweep(Record):
    """The content of sweep.json. parent_run_id: of the MLflow run that groups the trials."""

    id: str
    trials: dict[str, Planned]
    parent_run_id: str | None


class SweepRecord:
    """Reads and writes a sweep's state in its output; each file is replaced atomically.

    Every method raises what the store raises.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def read(self, path: str, schema: type[R]) -> R | None:
        """A record, or None if it does not exist. Raises DataError if it is damaged."""
        try:
            data = self.store.read(path)
        except MissingError:
            return None
        try:
            return unseal(data, schema)
        except DamagedError as error:
            raise DataError(f"{self.store.url}/{path}: {error}") from None

    def write(self, path: str, tree: Mapping[str, Any]) -> None:
        """Replace a record."""
        self.store.write(path, seal(dict(tree)))

    def claim(self, trials: list[Trial], resume: bool) -> Sweep:
        """The state of this sweep: new, or with `resume` the stored one.

        Raises ConfigError if the output holds another sweep or `resume` is needed, DataError for a damaged state.
        """
        url, begun = self.store.url, bool(self.store.list("trials/"))
        try:
            record = self.read(RECORD, Sweep)
        except DataError as error:
            raise DataError(f"{error}; set output elsewhere") from None
        if record is None and begun:
            raise DataError(f"{url}: has trials but no {RECORD}; set output elsewhere")
        if record is None:
            return Sweep(id=secrets.token_hex(8), trials={}, parent_run_id=None)
        if not begun:  # an earlier start failed before its first trial, for example because Ray did not answer
            return record
        if not resume:
            raise ConfigError(f"{url}: holds a sweep already; --resume goes on with it, or set output elsewhere")
        names = {trial.name for trial in trials}
        strangers = [name for name in record.trials if name not in names]
        if strangers:
            raise ConfigError(
                f"{url}: holds a sweep of other trials ({strangers[0]} is not among those of this config); set output "
                "elsewhere, or undo the change. A resumed sweep may only add seeds, values and draws"
            )
        return record

    def keep(self, record: Sweep, trials: list[Trial]) -> None:
        """Store the state with these trials."""
        planned = {trial.name: {"values": trial.values, "seed": trial.seed} for trial in trials}
        self.write(RECORD, record.model_dump() | {"trials": planned})

    def ended(self, name: str) -> Ended | None:
        """How a trial ended, or None if it has not ended. Raises DataError if its ended.json is damaged."""
        try:
            return self.read(f"trials/{name}/ended.json", Ended)
        except DataError as error:
            raise DataError(f"{error}; delete it to run the trial again") from None

    def check(self, trial: Trial, ended: Ended) -> None:
        """Raise DataError if the evaluation by which an ended trial is ranked cannot be found."""
        last = max((record["nimg"] for record in self.evaluations(trial.name)), default=0)
        wanted = {"finished": trial.config.train.total_nimg, "stopped": 1}.get(ended.state, 0)
        if last < wanted:
            path = f"{self.store.url}/trials/{trial.name}"
            raise DataError(
                f"{path}/{METRICS}: has no evaluation at the trial's end, nimg {ended.nimg}; bring the file back, or "
                "delete ended.json beside it to run the trial again"
            )

    def end(self, name: str, ended: Ended) -> None:
        """Store how a trial ended."""
        self.write(f"trials/{name}/ended.json", ended.model_dump())

    def forget(self, name: str) -> None:
        """Delete a trial's end, so that it runs again."""
        self.store.delete(f"trials/{name}/ended.json")

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """A trial's "eval" records by rising nimg; empty if there are none yet."""
        try:
            data = self.store.read(f"trials/{name}/{METRICS}")
        except MissingError:
            return []
        records = parse_records(data, f"{self.store.url}/trials/{name}/{METRICS}")
        return [record for record in records if record["kind"] == "eval"]
