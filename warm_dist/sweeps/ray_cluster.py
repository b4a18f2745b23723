"""Connects a sweep to Ray, on this machine or a cluster, and checks that a trial fits it."""

from __future__ import annotations

import os
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from warm_dist.config.sweep import SweepConfig
from warm_dist.config.values import exact
from warm_dist.cpus import usable_cpus
from warm_dist.errors import ConfigError, UnreachableError

_ENVIRONMENT = {  # read when ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output draws boxes even at verbose=0
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # results are in metrics.jsonl
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a step without an evaluation has no distance
}
_LOCAL = {  # for a Ray that serves this machine alone
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only, as is the default on Windows and macOS
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # default 15, which training would inherit
}
# The number of tries, default 20: a refused token would take 20 s, an address without a listener 14 minutes.
_JOINED = {"RAY_gcs_server_port_wait_time_s": "1"}
_CONNECT_S = 10.0
_SCRATCH = "/tmp"  # a short name: the path of a Unix socket has at most 107 bytes
_OBJECT_STORE_BYTES = 80 << 20  # the least that Ray accepts; nothing large is stored


@contextmanager
def connected(sweep: SweepConfig, say: Callable[[str], None]) -> Iterator[Any]:
    """Ray, connected to the cluster of the config or RAY_ADDRESS, else started here until the context ends.

    Raises UnreachableError if the cluster does not answer or refuses the token.
    """
    address = sweep.ray_address or os.environ.get("RAY_ADDRESS")
    os.environ.update(_ENVIRONMENT)
    options: dict[str, Any] = {"address": address}
    if address:
        os.environ.update(_JOINED)
    else:
        os.environ.update(_LOCAL | {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
        options = {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": usable_cpus(),
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    import ray

    _check_port(address)
    with tempfile.TemporaryDirectory(prefix="ray-", dir=_SCRATCH, ignore_cleanup_errors=True) as private:
        if not address:
            options["_temp_dir"] = f"{private}/ray"  # which Ray opens to everyone
        try:
            ray.init(**options, log_to_driver=False, logging_level="error", namespace="warm-dist")
        except Exception as error:  # ConnectionError, RuntimeError and Ray's own types
            raise UnreachableError(f"Ray at {address or 'this machine'}: {_cause(error)}") from None
        try:
            say(f"ray: {'joined ' + address if address else 'started on this machine, loopback only'}")
            yield ray
        finally:
            ray.shutdown()
            if not address:
                del os.environ["RAY_AUTH_TOKEN"]


def _check_port(address: str | None) -> None:
    """Raises UnreachableError at once for an address without a listener; Ray would take 40 s."""
    found = re.fullmatch(r"([^/]+):(\d+)", address or "")
    if found:
        try:
            socket.create_connection((found[1], int(found[2])), _CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise UnreachableError(f"Ray at {address}: {error}") from None


def _cause(error: BaseException) -> str:
    """The first sentence of the root cause, whose text may start with a traceback, and advice if there is any."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].split(". ")[0]
    if "No node info found" in reason:  # Ray looks for a local raylet
        return "it has no node here; start the sweep on one of its machines, in the same container"
    if "AuthToken" in reason:
        return f"{reason}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as on its machines"
    return reason


def check_resources(ray: Any, sweep: SweepConfig, say: Callable[[str], None]) -> None:
    """Report what a trial needs and what Ray has. Raises ConfigError if a trial can never run on our own Ray."""
    bundle, nodes = sweep.trial.bundle, [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = [node for node in nodes if all(node.get(kind, 0) >= amount for kind, amount in bundle.items())]
    wants = " and ".join(f"{exact(amount)} {kind}" for kind, amount in bundle.items())
    most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU")}
    have = f"{len(nodes)} machines, the largest with {exact(most['CPU'])} CPU and {exact(most['GPU'])} GPU"
    say(f"ray: a trial takes {wants} on {sweep.trial.nodes} of {have}")
    if len(fits) < sweep.trial.nodes:
        message = f"a trial needs {wants} on each of {sweep.trial.nodes} machines; Ray has {have}"
        if not (sweep.ray_address or os.environ.get("RAY_ADDRESS")):
            raise ConfigError(f"{message}; set trial.cpus_per_process, trial.gpus_per_process or trial.nodes lower")
        say(f"ray: {message}; trials wait until the cluster grows")
