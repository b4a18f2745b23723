"""The two servers of the quickstart and of `make ui`: the embedded S3 and MLflow, on loopback, ended with their owner."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.shards.manifest import read_manifest
from warm_dist import supervisor
from warm_dist.config.run import Config
from warm_dist.errors import DataError, PeerError, PortError, UnreachableError
from warm_dist.files import claimed
from warm_dist.store.seaweedfs import S3Server

HOST = "127.0.0.1"
BUCKET = "warm-dist"
START_S = 120.0  # MLflow makes its database on the first start: 10 s on two idle cores


@dataclass(frozen=True)
class Services:
    """What runs: the embedded S3, and MLflow's address and process."""

    s3: S3Server
    mlflow_url: str
    mlflow: subprocess.Popen[bytes]


@contextmanager
def services(root: Path, ui_port: int | None = None) -> Iterator[Services]:
    """Start both on the data in `root` (s3/, mlflow.db), stop both at the end; their logs are there too.

    ui_port: MLflow's; None picks a free one. Raises PortError if it is in use, OutputError if `root` cannot be written
    or another quickstart or ui uses it, UnreachableError with the end of the log if a server does not start.
    """
    with ExitStack() as stack:
        stack.enter_context(claimed(root, "make quickstart, make sweep or make ui"))
        port = supervisor.free_port() if ui_port is None else _checked(ui_port)
        s3 = stack.enter_context(S3Server(root / "s3", BUCKET))
        url, log = f"http://{HOST}:{port}", root / "mlflow.log"
        process = supervisor.start(_command(root, port), _environment(s3), log)
        stack.callback(supervisor.stop, process)
        _wait_until_healthy(url, process, log)
        yield Services(s3, url, process)


def pack_openmoji(config: Config, servers: Services) -> None:
    """Pack the quickstart's pictures where the config's manifest is to be, unless they are there. Raises PeerError."""
    folder = config.data.manifest.rpartition("/")[0]
    endpoint = servers.s3.endpoint_url
    try:
        read_manifest(config.data.manifest, endpoint)
    except DataError:  # none, half a pack (the manifest comes last), or one of an older version
        command = [sys.executable, "-m", "data_pipelines.pack", "openmoji", folder]
        command += ["--resolution", str(config.data.resolution), "--endpoint-url", endpoint]
        code = subprocess.run(command).returncode
        if code:
            raise PeerError("packing has failed, see above", code, resumable=False) from None


def _command(root: Path, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{root.resolve() / 'mlflow.db'}"),
        *("--artifacts-destination", f"s3://{BUCKET}/mlflow"),
    ]


def _environment(s3: S3Server) -> dict[str, str]:
    """Ours without settings for other servers, with the credentials that only this server needs."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}
    return {
        **inherited,
        **s3.env,
        "MLFLOW_S3_ENDPOINT_URL": s3.endpoint_url,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else it starts processes for jobs that nobody submits
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-8:])
                raise UnreachableError(f"MLflow did not start ({error}); {log} ends:\n  {tail}") from None
        time.sleep(0.1)


def _checked(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed server's TIME_WAIT is no use
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise PortError(f"port {port}: {error.strerror}; choose another, --port or make ui UI_PORT=N") from None
    return port
