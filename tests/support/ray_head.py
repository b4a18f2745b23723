"""One Ray for several sweeps, on loopback: a sweep that joins it starts 8 seconds sooner than one with a Ray of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import free_port, wait_for
from warm_dist import supervisor

HOST = "127.0.0.1"


@contextmanager
def ray_head(folder: Path, env: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yields the environment in which a command joins it. env: of all trials, S3's credentials among it."""
    token, log, port = folder / "token", folder / "ray.log", free_port()
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    scratch = tempfile.mkdtemp(prefix="wdray")  # short: Ray's sockets lie there, of 107 bytes at most
    theirs = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += [f"--node-ip-address={HOST}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    command += [f"--object-store-memory={80 << 20}", f"--temp-dir={scratch}"]
    inherited = {name: value for name, value in {**os.environ, **env}.items() if not name.startswith("RAY_")}
    process = supervisor.start(command, inherited | theirs, log)
    try:
        wait_for("Ray", lambda: "Ray runtime started" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield theirs | {"RAY_ADDRESS": f"{HOST}:{port}"}
    finally:
        supervisor.stop(process, 1)  # Ray's own end takes longer, and keeps nothing that anybody wants
        shutil.rmtree(scratch, ignore_errors=True)
