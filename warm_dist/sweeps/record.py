"""What a sweep's output knows of it: who it is, and how each of its trials ended. All that a resume needs."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from warm_dist.errors import ConfigError, DataError
from warm_dist.runs.metrics import parse_records
from warm_dist.store.base import Store
from warm_dist.sweeps.trials import Trial

RECORD = "sweep.json"


@dataclass(frozen=True)
class Ended:
    """How a trial ended: state "finished", "stopped" (by the scheduler) or "failed", why, and how far it was."""

    state: str
    reason: str
    nimg: int


class SweepRecord:
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
        record, url, begun = self.read(RECORD), self.store.url, bool(self.store.list("trials/"))
        if record is None and begun:
            raise DataError(f"{url}: has trials but no {RECORD}; set output elsewhere")
        if record is None:
            return {"id": secrets.token_hex(8), "trials": {}, "parent_run_id": None}
        if not isinstance(record, dict) or not {"id", "trials", "parent_run_id"} <= record.keys():
            raise DataError(f"{url}/{RECORD}: is no sweep's; set output elsewhere")
        if not begun:  # a start that came to nothing, since Ray did not answer, say
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
        path = f"trials/{name}/ended.json"
        found = self.read(path)
        if found is None:
            return None
        try:
            return Ended(**found)
        except TypeError:
            raise DataError(
                f"{self.store.url}/{path}: is no end of a trial; delete it to run the trial again"
            ) from None

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
