"""The servers of quickstart and ui: Ctrl-C while they start, and a port in use. What they serve: test_quickstart.py."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import services, ui
from tests.support.family import descendants, ends_cleanly
from tests.support.processes import wait_for
from warm_dist import supervisor
from warm_dist.errors import PortError

UI = str(Path(ui.__file__))


def start_ui(root: Path) -> subprocess.Popen[str]:
    """`launch/ui.py` on a folder that a quickstart has used: there is an MLflow database, empty as it may be."""
    (root / "mlflow.db").touch()
    command = [sys.executable, UI, "--root", str(root), "--port", str(supervisor.free_port())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_ctrl_c_ends_ui_while_it_starts(tmp_path: Path) -> None:
    with start_ui(tmp_path) as process:
        wait_for("the first server", lambda: len(descendants(process.pid)) >= 3)
        assert ends_cleanly(process, signal.SIGINT)


def test_a_port_in_use_is_named_with_the_flag_to_change(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match=rf"port {port}: .* in use; choose another, --port or make ui UI_PORT=N"):
            services._checked(port)
    assert services._checked(port) == port
    with pytest.raises(PortError, match=r"port 99999: needs 0 to 65535; choose another"):
        services._checked(99999)
