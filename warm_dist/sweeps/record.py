"""A sweep's state in its output folder: its id and how each trial ended. Enough to resume."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from warm_dist.errors import ConfigError, DataError
from warm_dist.runs.folder import METRICS
from warm_dist.runs.metrics import parse_records
from warm_dist.store.base import Store
from warm_dist.sweeps.trials import Trial

RECORD = "sweep.json"


@dataclass(frozen=True)
class Ended:
    """How a trial ended: "finished", "stopped" (by the scheduler) or "failed", the reason, and its last nimg."""

    state: str
    reason: str
    nimg: int


class SweepRecord:
    """Reads and writes a sweep's state in its output; each file is replaced atomically.

    Every method raises what the store raises.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def read(self, path: str) -> Any:
        """The content of a JSON file, or None if it does not exist. Raises DataError if it is not JSON."""
        try:
            data = self.store.read(path)
        except DataError:
            return None
        try:
            return json.loads(data)
        except ValueError:
            raise DataError(f"{self.store.url}/{path}: is not JSON") from None

    def write(self, path: str, tree: Any) -> None:
        """Replace a JSON file."""
        self.store.write(path, (json.dumps(tree, indent=2) + "\n").encode())

    def claim(self, trials: list[Trial], resume: bool) -> dict[str, Any]:
        """The state of this sweep: new, or with `resume` the stored one.

        Raises ConfigError if the output holds another sweep or `resume` is needed, DataError for a damaged state.
        """
        record, url, begun = self.read(RECORD), self.store.url, bool(self.store.list("trials/"))
        if record is None and begun:
            raise DataError(f"{url}: has trials but no {RECORD}; set output elsewhere")
        if record is None:
            return {"id": secrets.token_hex(8), "trials": {}, "parent_run_id": None}
        if not isinstance(record, dict) or not {"id", "trials", "parent_run_id"} <= record.keys():
            raise DataError(f"{url}/{RECORD}: is not a sweep's; set output elsewhere")
        if not begun:  # an earlier start failed before its first trial, for example because Ray did not answer
            return dict(record)
        if not resume:
            raise ConfigError(f"{url}: holds a sweep already; --resume goes on with it, or set output elsewhere")
        names = {trial.name for trial in trials}
        strangers = [name for name in record["trials"] if name not in names]
        if strangers:
            raise ConfigError(
                f"{url}: holds a sweep of other trials ({strangers[0]} is not among those of this config); set output "
                "elsewhere, or undo the change. A resumed sweep may only add seeds, values and draws"
            )
        return dict(record)

    def keep(self, record: dict[str, Any], trials: list[Trial]) -> None:
        """Store the state with these trials."""
        record["trials"] = {trial.name: {"values": trial.values, "seed": trial.seed} for trial in trials}
        self.write(RECORD, record)

    def ended(self, name: str) -> Ended | None:
        """How a trial ended, or None if it has not ended. Raises DataError if its ended.json is damaged."""
        path = f"trials/{name}/ended.json"
        found = self.read(path)
        if found is None:
            return None
        try:
            return Ended(**found)
        except TypeError:
            raise DataError(f"{self.store.url}/{path}: is damaged; delete it to run the trial again") from None

    def end(self, name: str, ended: Ended) -> None:
        """Store how a trial ended."""
        self.write(f"trials/{name}/ended.json", vars(ended))

    def forget(self, name: str) -> None:
        """Delete a trial's end, so that it runs again."""
        self.store.delete(f"trials/{name}/ended.json")

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """A trial's "eval" records by rising nimg; empty if there are none yet."""
        try:
            text = self.store.read(f"trials/{name}/{METRICS}").decode("utf-8", "replace")
        except DataError:
            return []
        return [record for record in parse_records(text) if record["kind"] == "eval"]
