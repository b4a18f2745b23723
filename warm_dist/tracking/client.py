"""Talking to an MLflow server: one kind of error, runs that are made once, and nothing secret in what is sent."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from warm_dist.config.load import flatten
from warm_dist.errors import ConfigError, UnreachableError, WarmDistError, redact

# MLflow's own retries block for four minutes and may make a run twice; whoever calls us tries again, after looking.
# A minute lets a server through that needs half of one for each answer.
CLIENT_ENV = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
RUN_TAG = "warm_dist.run"  # carries the identity by which a run is found again
PARENT_TAG = "mlflow.parentRunId"
MAX_METRICS, MAX_OTHERS = 1000, 100  # MLflow's limits for one log_batch
MAX_REASON = 300
MAX_VALUE = 6000  # and for the length of a parameter; a tag may have 8000
Point = tuple[str, int]
"""A metric's key, "train/loss", and its step."""


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """All that goes wrong between us and the server, or its artifact store, as one UnreachableError.

    Raises ConfigError if `url` is no server's. The client raises its own kind, those of requests and boto3, OSError, and
    what it meets in answers that are no MLflow's.
    """
    if not re.match("https?://", url):
        raise ConfigError(f"{redact(url)}: MLflow is reached by way of a server, http://… or https://…")
    os.environ.update({name: os.environ.get(name, value) for name, value in CLIENT_ENV.items()})
    try:
        yield
    except WarmDistError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        reason = re.sub(r"\?\S+", "", redact(reason))[:MAX_REASON]  # it may quote the address without its host
        raise UnreachableError(f"MLflow at {redact(url)}: {reason}") from None


@contextlib.contextmanager
def patience(num_bytes: int) -> Iterator[None]:
    """Let a request that carries a large file take a second more for each megabyte."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(int(before) + num_bytes // 1_000_000)
    try:
        yield
    finally:
        os.environ[name] = before


def client_of(url: str) -> Any:
    """An MlflowClient; use it inside `reaching`."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=url)


def find_or_make(
    client: Any,
    experiment: str,
    identity: str,
    run_name: str,
    tags: dict[str, str] | None = None,
    start_ms: int | None = None,
    known: str = "",
) -> Any:
    """The one run of the experiment that carries `identity` in its tag, made if there is none.

    If its making was asked for twice, since a reply came late, the run with id `known` stays, else the first one; the
    others are deleted.
    """
    experiment_id = _experiment_id(client, experiment)
    found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{identity}'", max_results=10)
    if not found:
        tags = {RUN_TAG: identity, **(tags or {})}
        made = client.create_run(experiment_id, start_time=start_ms, run_name=run_name, tags=tags)
        if not made.info.run_id:
            raise ValueError("the answer names no run: this is no MLflow server")
        return made
    first, *others = sorted(found, key=lambda run: (run.info.run_id != known, run.info.start_time, run.info.run_id))
    for run in others:
        client.delete_run(run.info.run_id)
    return first


def _experiment_id(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another run of the same sweep was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def log_batches(
    client: Any,
    run_id: str,
    metrics: dict[Point, tuple[float, float]] | None = None,
    params: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
) -> None:
    """Send any number of values. metrics: {(key, step): (value, unix seconds)}. Sent again, they are the same values."""
    from mlflow.entities import Metric, Param, RunTag

    points = [
        Metric(key, value, timestamp=int(at * 1000), step=step) for (key, step), (value, at) in (metrics or {}).items()
    ]
    for part in _parts(points, MAX_METRICS):
        client.log_batch(run_id, metrics=part)
    for part in _parts([Param(key, value) for key, value in (params or {}).items()], MAX_OTHERS):
        client.log_batch(run_id, params=part)
    for part in _parts([RunTag(key, value) for key, value in (tags or {}).items()], MAX_OTHERS):
        client.log_batch(run_id, tags=part)


def log_finished(
    url: str,
    experiment: str,
    run_name: str,
    identity: str,
    *,
    params: dict[str, Any],
    metrics: dict[Point, float],
    files: list[Path],
    parent: str | None = None,
) -> str:
    """One finished run of a computation that is not training, or what is new of one; returns its id.

    identity: what no other computation has; the same one goes on in the same run. Raises UnreachableError.
    """
    with reaching(url):
        client = client_of(url)
        tags = {PARENT_TAG: parent} if parent else {}
        run = find_or_make(client, experiment, identity, run_name, tags)
        run_id, now = str(run.info.run_id), time.time()
        held = history(client, run)
        texts = {key: str(redact(value))[:MAX_VALUE] for key, value in params.items()}
        log_batches(
            client,
            run_id,
            {point: (value, now) for point, value in metrics.items() if point not in held},
            {key: text for key, text in texts.items() if key not in run.data.params},
            {f"changed.{key}": text for key, text in texts.items() if run.data.params.get(key, text) != text},
        )
        for path in files:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id, "FINISHED")
        return run_id


def open_parent(url: str, experiment: str, run_name: str, identity: str, params: dict[str, Any]) -> str:
    """The run that a sweep's trials are shown under (`tracking.parent_run_id`), made once; returns its id.

    identity: what no other sweep has. Raises UnreachableError.
    """
    with reaching(url):
        client = client_of(url)
        run = find_or_make(client, experiment, identity, run_name)
        texts = {key: str(redact(value))[:MAX_VALUE] for key, value in params.items()}
        new = {key: text for key, text in texts.items() if key not in run.data.params}
        log_batches(client, run.info.run_id, params=new)
        return str(run.info.run_id)


def history(client: Any, run: Any) -> set[Point]:
    """All that the server holds of a run: one request a metric."""
    run_id = run.info.run_id
    return {(key, metric.step) for key in run.data.metrics for metric in client.get_metric_history(run_id, key)}


def as_texts(tree: dict[str, Any]) -> dict[str, str]:
    """A tree as MLflow takes parameters and tags: dotted keys, texts of bounded length, nothing secret."""
    return {key: str(redact(value))[:MAX_VALUE] for key, value in flatten(tree).items()}


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
