"""Access to an MLflow server: one kind of error, runs created once, and no secrets in what is sent."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from warm_dist.config.load import flatten
from warm_dist.config.urls import check_url
from warm_dist.deadlines import answers_within
from warm_dist.errors import AccessError, UnreachableError, WarmDistError, redact

# MLflow's own retries block for four minutes and can create a run twice, so callers retry after looking for the run.
# A timeout of 60 s allows for servers that take half a minute to answer.
CLIENT_ENV = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
RUN_TAG = "warm_dist.run"  # the identity by which a run is found again
PARENT_TAG = "mlflow.parentRunId"
MAX_METRICS, MAX_OTHERS = 1000, 100  # MLflow's limits for one log_batch
MAX_REASON = 300
MAX_VALUE = 6000  # MLflow's limit for the length of a parameter; a tag may have 8000
_REFUSED = re.compile("credential|Token|AccessKey|AccessDenied|Signature|Forbidden|403", re.IGNORECASE)
_FOREIGN = re.compile(
    "valid JSON format|failed with error code|INTERNAL_ERROR: Response:|^(Parse|Key|Type|Attribute)Error"
)
REFUSALS = UnreachableError, AccessError
"""What `reaching` raises where not everything has arrived."""
Point = tuple[str, int]
"""A metric's key, "train/loss", and its step."""


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn every failure of the server or its artifact store into UnreachableError, or AccessError where MLflow asks who it is.

    The client raises its own errors, those of requests and boto3, OSError, and parse errors for foreign answers.
    Raises ConfigError if `url` is not a server's or holds credentials.
    """
    check_url(url, server=True)
    os.environ.update({name: os.environ.get(name, value) for name, value in CLIENT_ENV.items()})
    try:
        with answers_within(_whole_answer_s()):
            yield
    except WarmDistError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        reason = re.sub(r"\?\S+", "", redact(reason))  # may quote an address without its host
        reason = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"
        if getattr(error, "get_http_status_code", int)() in (401, 403):
            raise AccessError(
                f"MLflow at {redact(url)}: refuses the request ({reason}); set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from None
        if _FOREIGN.search(reason):
            reason = f"this is not an MLflow server ({reason})"
        if _forget_credentials() and _REFUSED.search(reason):
            reason += f"; check AWS_ACCESS_KEY_ID, AWS_PROFILE or {_credentials_file()}, which the next try reads again"
        raise UnreachableError(f"MLflow at {redact(url)}: {reason}") from None


def _forget_credentials() -> bool:
    """Have MLflow's S3 client read its credentials again, as after a rotation; False if it has none.

    It keeps its client, and boto3 the first credentials of its default session.
    """
    module, boto3 = sys.modules.get("mlflow.store.artifact.s3_artifact_repo"), sys.modules.get("boto3")
    if module is None or boto3 is None:
        return False
    module._cached_get_s3_client.cache_clear()
    vars(boto3)["DEFAULT_SESSION"] = None
    return True


def _credentials_file() -> str:
    return os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"


@contextlib.contextmanager
def patience(num_bytes: int) -> Iterator[None]:
    """Extend the request timeout by a second for each megabyte of an upload."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(int(before) + num_bytes // 1_000_000)
    try:
        with answers_within(_whole_answer_s()):
            yield
    finally:
        os.environ[name] = before


def _whole_answer_s() -> float:
    """For an answer that drips: twice the longest silence that is allowed in it."""
    return 2.0 * int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])


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
    """Find the run of the experiment that is tagged with `identity`, or create it with these tags and start time.

    start_ms: unix milliseconds. If a late reply created several runs, the one with id `known` is kept, else the first;
    the others are deleted. Raises ValueError if the server is not MLflow, and what the client raises.
    """
    experiment_id = _experiment_id(client, experiment)
    found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{identity}'", max_results=10)
    if not found:
        tags = {RUN_TAG: identity, **(tags or {})}
        created = client.create_run(experiment_id, start_time=start_ms, run_name=run_name, tags=tags)
        if not created.info.run_id:
            raise ValueError("the answer has no run id: this is not an MLflow server")
        return created
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
        except MlflowException:  # another process may have created it since
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
    """Send any number of values in batches; sending a value again changes nothing.

    metrics: {(key, step): (value, unix seconds)}.
    """
    from mlflow.entities import Metric, Param, RunTag

    points = [Metric(key, value, int(at * 1000), step) for (key, step), (value, at) in (metrics or {}).items()]
    for kind, items, size in (
        ("metrics", points, MAX_METRICS),
        ("params", [Param(key, value) for key, value in (params or {}).items()], MAX_OTHERS),
        ("tags", [RunTag(key, value) for key, value in (tags or {}).items()], MAX_OTHERS),
    ):
        for start in range(0, len(items), size):
            client.log_batch(run_id, **{kind: items[start : start + size]})


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
    """Log a computation other than training as a finished run and return the run's id.

    identity: unique to the computation; with the same one, only new values are added to its run. Raises UnreachableError.
    """
    with reaching(url):
        client = client_of(url)
        tags = {PARENT_TAG: parent} if parent else {}
        run = find_or_make(client, experiment, identity, run_name, tags)
        run_id, now = str(run.info.run_id), time.time()
        held, known, texts = history(client, run), run.data.params, _texts(params)
        new_points = {point: (value, now) for point, value in metrics.items() if point not in held}
        new_params = {key: text for key, text in texts.items() if key not in known}
        changed = {f"changed.{key}": text for key, text in texts.items() if known.get(key, text) != text}
        log_batches(client, run_id, new_points, new_params, changed)
        for path in files:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id, "FINISHED")
        return run_id


def open_parent(url: str, experiment: str, run_name: str, identity: str, params: dict[str, Any]) -> str:
    """Create or find the parent run of a sweep's trials and return its id, the trials' `tracking.parent_run_id`.

    identity: unique to the sweep. Raises UnreachableError.
    """
    with reaching(url):
        client = client_of(url)
        run = find_or_make(client, experiment, identity, run_name)
        new = {key: text for key, text in _texts(params).items() if key not in run.data.params}
        log_batches(client, run.info.run_id, params=new)
        return str(run.info.run_id)


def history(client: Any, run: Any) -> set[Point]:
    """All points of a run that the server has; one request per metric."""
    run_id = run.info.run_id
    return {(key, metric.step) for key in run.data.metrics for metric in client.get_metric_history(run_id, key)}


def as_texts(tree: dict[str, Any]) -> dict[str, str]:
    """A tree as MLflow's parameters or tags: dotted keys, texts of bounded length without secrets."""
    return _texts(flatten(tree))


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {key: str(redact(value))[:MAX_VALUE] for key, value in values.items()}
