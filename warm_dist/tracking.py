"""MLflow as a mirror of a run's folder: metrics.jsonl is the truth, and whatever the server already holds is not sent again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from warm_dist.config_file import flatten
from warm_dist.errors import UnreachableError
from warm_dist.metrics import parse_line, read_json, write_json

# A dead server must be noticed in seconds: MLflow's own defaults block for four minutes (see the retry in launch/mirror).
CLIENT_ENV = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_RUN_TAG = "warm_dist.run"  # names the folder's run, so that it is found again without mirror.json
_MAX_METRICS, _MAX_OTHERS = 1000, 100  # MLflow's limits for one log_batch
_MAX_VALUE = 6000  # and for the length of a parameter; a tag may have 8000
_RECORD_KEYS = {"time", "attempt", "nimg", "kind"}

Point = tuple[str, int]
"""A metric's key, "train/loss", and its step, which is nimg."""


class Mirror:
    """One run's folder and the MLflow run that shows it.

    `sync` sends what is new and may be called as often as one likes; `finish` sets the end. Both raise UnreachableError
    when the server does not take everything; nothing is lost or doubled then, the next call goes on. What was sent is
    kept in mirror.json, but only to save time: after a start and after every failure the server is asked what it holds.
    """

    def __init__(self, run: Path, url: str, experiment: str, run_name: str | None = None) -> None:
        self.run, self.url, self.experiment, self.run_name = run, url, experiment, run_name or run.name
        self._client: Any = None
        self._connected = False
        self._run_id = ""
        self._status = ""
        self._offset = 0
        self._held: set[Point] = set()
        self._artifacts: set[str] = set()

    def sync(self, running: bool) -> int:
        """Send new metrics and new sample grids; returns how many metric values that were.

        Makes the MLflow run when metrics.jsonl has its first line. running: the run is under way, which the status says.
        """
        if not self._identity():
            return 0
        with self._server():
            self._connect()
            if running and self._status != "RUNNING":
                self._client.update_run(self._run_id, status="RUNNING")
                self._status = "RUNNING"
            count = self._send_metrics()
            for path in sorted((self.run / "samples").glob("*.png")):
                self._send_file(path, "samples")
        return count

    def finish(self, status: str, tags: dict[str, str], end_time: float, files: list[Path]) -> None:
        """Send the rest, further files and the end. status: FINISHED, FAILED or KILLED; end_time: unix seconds."""
        self.sync(running=False)
        with self._server():
            self._connect()
            for path in files:
                self._client.log_artifact(self._run_id, str(path))
            self._log(tags=_tags(tags))
            self._client.set_terminated(self._run_id, status, end_time=int(end_time * 1000))
            self._status = status

    @contextlib.contextmanager
    def _server(self) -> Iterator[None]:
        try:
            with _reaching(self.url):
                yield
        except UnreachableError:
            self._connected = False  # whether the last request took effect is unknown: ask before sending again
            raise

    def _connect(self) -> None:
        """Find or make the MLflow run and learn what it holds."""
        if self._connected:
            return
        from mlflow import MlflowClient

        self._client = self._client or MlflowClient(tracking_uri=self.url)
        state = read_json(self.run / "mirror.json") or {}
        found = self._find(state.get("run_id", "")) or self._create()
        self._run_id, self._status = found.info.run_id, found.info.status
        self._offset = state.get("offset", 0) if state.get("run_id") == self._run_id else 0
        self._save()
        self._held = {
            (key, metric.step)
            for key in found.data.metrics
            for metric in self._client.get_metric_history(self._run_id, key)
        }
        self._artifacts = {file.path for file in self._client.list_artifacts(self._run_id, "samples")}
        self._describe(found.data.params)
        self._connected = True

    def _find(self, run_id: str) -> Any:
        """The run of mirror.json, or else one that carries our tag; None if the server has neither."""
        experiment = self._client.get_experiment_by_name(self.experiment)
        identity = self._identity()
        if experiment is None:
            return None
        for query in (f"attributes.run_id = '{run_id}'", f"tags.`{_RUN_TAG}` = '{identity}'"):
            for found in self._client.search_runs([experiment.experiment_id], query, max_results=1):
                if found.data.tags.get(_RUN_TAG, identity) == identity:  # else the folder was emptied and used again
                    return found
        return None

    def _create(self) -> Any:
        first = parse_line(self._first_line().decode()) or {}
        start = {"start_time": int(first["time"] * 1000)} if "time" in first else {}
        tags = {_RUN_TAG: self._identity()} if self._identity() else {}
        return self._client.create_run(
            _experiment_id(self._client, self.experiment), run_name=self.run_name, tags=tags, **start
        )

    def _describe(self, known: dict[str, str]) -> None:
        """Parameters, tags and the config file. MLflow never changes a parameter: a later attempt's value is a tag."""
        config = public(read_json(self.run / "config.json") or {})
        # "$schema" is an editor's affair, and a name that MLflow refuses
        params = {key: str(value)[:_MAX_VALUE] for key, value in flatten(config).items() if not key.startswith("$")}
        info = read_json(self.run / "run.json") or {}
        tags = {f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value}
        tags |= {_RUN_TAG: self._identity()} if self._identity() else {}
        tags |= {"mlflow.source.git.commit": info["commit"]} if "commit" in info else {}
        self._log(params={k: v for k, v in params.items() if k not in known}, tags=_tags({**info, **tags}))
        self._client.log_text(self._run_id, json.dumps(config, indent=2) + "\n", "config.json")

    def _send_metrics(self) -> int:
        """One log_batch per thousand values; the offset moves when all of them have arrived."""
        pending: dict[Point, tuple[int, float, float]] = {}
        tags: dict[str, str] = {}
        records, end = self._new_records()
        for record in records:
            for name in record.keys() - _RECORD_KEYS:
                value, point = record[name], (f"{record['kind']}/{name}", record["nimg"])
                if isinstance(value, str):
                    tags[f"{record['kind']}.{name}"] = value
                elif value is not None and point not in self._held:
                    entry = (record["attempt"], record["time"], float(value))
                    pending[point] = max(pending.get(point, entry), entry)  # the highest attempt's, as for all readers
        self._log(metrics=pending, tags=_tags(tags))
        if end != self._offset:
            self._offset = end
            self._save()
        return len(pending)

    def _new_records(self) -> tuple[list[dict[str, Any]], int]:
        """The records of the whole lines beyond the offset, and where these lines end."""
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(self._offset)
                lines = file.read().rpartition(b"\n")[0]  # what follows is still being written
        except OSError:
            return [], self._offset
        records = [parse_line(line.decode(errors="replace")) for line in lines.split(b"\n")]
        return [record for record in records if record is not None], self._offset + len(lines) + bool(lines)

    def _log(
        self,
        metrics: dict[Point, tuple[int, float, float]] | None = None,
        params: dict[str, str] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        points = [
            Metric(key, value, timestamp=int(time * 1000), step=step)
            for (key, step), (_, time, value) in (metrics or {}).items()
        ]
        for part in _parts(points, _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=part)
            self._held.update((metric.key, metric.step) for metric in part)
        for part in _parts([Param(key, value) for key, value in (params or {}).items()], _MAX_OTHERS):
            self._client.log_batch(self._run_id, params=part)
        for part in _parts([RunTag(key, value) for key, value in (tags or {}).items()], _MAX_OTHERS):
            self._client.log_batch(self._run_id, tags=part)

    def _send_file(self, path: Path, folder: str) -> None:
        name = f"{folder}/{path.name}"
        if name not in self._artifacts:
            self._client.log_artifact(self._run_id, str(path), folder)
            self._artifacts.add(name)

    def _save(self) -> None:
        write_json(self.run / "mirror.json", {"run_id": self._run_id, "offset": self._offset})

    def _first_line(self) -> bytes:
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                line = file.readline()
        except OSError:
            return b""
        return line if line.endswith(b"\n") else b""

    def _identity(self) -> str:
        """What no other run has: a digest of the first line of metrics.jsonl, time stamp included; "" without one."""
        line = self._first_line()
        return hashlib.sha256(line).hexdigest()[:32] if line else ""


def log_once(
    url: str, experiment: str, run_name: str, params: dict[str, Any], metrics: dict[str, float], files: list[Path]
) -> str:
    """One finished MLflow run of a computation that is not training; returns its id. Raises UnreachableError."""
    with _reaching(url):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        client = MlflowClient(tracking_uri=url)
        run_id: str = client.create_run(_experiment_id(client, experiment), run_name=run_name).info.run_id
        now = int(time.time() * 1000)
        client.log_batch(
            run_id,
            metrics=[Metric(key, value, now, 0) for key, value in metrics.items()],
            params=[Param(key, str(public(value))[:_MAX_VALUE]) for key, value in params.items()],
        )
        for path in files:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id, "FINISHED")
        return run_id


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """MLflow's and the network's errors as one UnreachableError, after seconds."""
    os.environ.update({name: os.environ.get(name, value) for name, value in CLIENT_ENV.items()})
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise UnreachableError(f"MLflow at {public(url)}: {public(str(error)).splitlines()[0]}") from None


def _experiment_id(client: Any, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name))


def public(value: Any) -> Any:
    """The same tree or text without what may be secret in an URL: user, password, query (signed links), fragment."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\w://[^\s?#]*)[?#]\S*", r"\1", re.sub(r"(\w://)[^/\s@]*@", r"\1", value))
    return value


def _tags(tree: dict[str, Any]) -> dict[str, str]:
    return {key: str(public(value))[:_MAX_VALUE] for key, value in flatten(tree).items()}


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
