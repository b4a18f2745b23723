"""The servers of the quickstarts and of `make ui`, S3 and MLflow on loopback, and what both quickstarts do with them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.shards.manifest import read_manifest
from warm_dist import supervisor
from warm_dist.config.run import Config
from warm_dist.errors import DataError, PeerError, PortError, UnreachableError
from warm_dist.files import claimed
from warm_dist.store.base import split_url
from warm_dist.store.seaweedfs import S3Server

HOST = "127.0.0.1"
BUCKET = "warm-dist"
START_S = 120.0  # MLflow creates its database on the first start: 10 s on two idle cores


@dataclass(frozen=True)
class Services:
    """The running servers: the embedded S3, MLflow's address and process."""

    s3: S3Server
    mlflow_url: str
    mlflow: subprocess.Popen[bytes]

    @property
    def settings(self) -> list[str]:
        """Overrides that point a config at these servers, for `--set`."""
        return [f"data.endpoint_url={self.s3.endpoint_url}", f"tracking.mlflow_url={self.mlflow_url}"]

    def adopt(self) -> None:
        """Have boto3 and MLflow, here and in child processes, use these servers' credentials and no others."""
        for name in os.environ.keys() - _without_others().keys():
            del os.environ[name]
        os.environ.update(self.s3.env)


@contextmanager
def services(root: Path, ui_port: int | None = None) -> Iterator[Services]:
    """Run both servers on the data in `root` (s3/, mlflow.db) until the context ends; logs are in `root` too.

    ui_port: MLflow's port; None picks a free one. Raises PortError if it is in use, OutputError if `root` cannot be
    written or is in use, UnreachableError with the end of the log if a server does not start.
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
    """Pack OpenMoji for the config's manifest, unless that exists. Raises PeerError if packing fails."""
    folder = split_url(config.data.manifest)[0]
    endpoint = servers.s3.endpoint_url
    try:
        read_manifest(config.data.manifest, endpoint)
    except DataError:  # missing, incomplete (the manifest is written last), or of an older version
        command = [sys.executable, "-m", "data_pipelines.pack", "openmoji", folder]
        command += ["--resolution", str(config.data.resolution), "--endpoint-url", endpoint]
        code = subprocess.run(command).returncode
        if code:
            raise PeerError("packing failed, see above", code, resumable=False) from None


def stop_child(process: subprocess.Popen[bytes], signum: int, every_s: float, patience_s: float) -> int:
    """Send a child `signum` every `every_s` seconds until it ends, kill it after `patience_s`; returns its exit code."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        process.send_signal(signum)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(every_s)
    print("the command does not stop and is killed", file=sys.stderr, flush=True)
    return supervisor.stop(process)


def ui_command(root: Path) -> str:
    """The command that shows MLflow on the data in `root`."""
    return "make ui" if root == Path("runs") else f"make ui (python launch/ui.py --root {root})"


def _command(root: Path, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{root.resolve() / 'mlflow.db'}"),
        *("--artifacts-destination", f"s3://{BUCKET}/mlflow"),
    ]


def _environment(s3: S3Server) -> dict[str, str]:
    """This process's environment without settings for other servers, with the embedded S3's credentials."""
    return {
        **_without_others(),
        **s3.env,
        "MLFLOW_S3_ENDPOINT_URL": s3.endpoint_url,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves processes for jobs, which are not used
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }


def _without_others() -> dict[str, str]:
    """This process's environment without settings for other servers, such as a session token or a profile of AWS."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}


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
    try:
        return supervisor.free_port(HOST, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "needs 0 to 65535"
        raise PortError(f"port {port}: {reason}; choose another, --port or make ui UI_PORT=N") from None
