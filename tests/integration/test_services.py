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


<<<<<<< HEAD
=======
def descendants(pid: int) -> set[int]:
    """The process and all below it."""
    family, grown = {pid}, True
    parents = {int(p.name): supervisor._children(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit()}
    while grown:
        more = {child for parent in family for child in parents.get(parent, [])} - family
        family, grown = family | more, bool(more)
    return family


def listening(pids: set[int]) -> set[str]:
    """Hexadecimal addresses of every listening TCP socket of these processes, IPv4 and IPv6."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def ends_cleanly(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """The exit code is 0 and no process of its tree is left."""
    family = [supervisor.identity(pid) for pid in descendants(process.pid) - {process.pid}]
    process.send_signal(number)
    process.communicate(timeout=30)
    return process.returncode == 0 and not [who for who in family if supervisor.alive(who)]


def test_ui_serves_on_loopback_alone_and_ends_on_sigterm(tmp_path: Path) -> None:
    with start_ui(tmp_path) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("MLflow: http://127.0.0.1:")
        assert line.endswith(" (Ctrl-C to stop)\n")
        with urllib.request.urlopen(line.split()[1], timeout=30) as page:
            assert b"MLflow" in page.read()
        family = descendants(process.pid)
        assert len(family) == 6, "ui; for each server a supervisor; weed; mlflow and its one worker: no job runners"
        assert listening(family) == {"0100007F"}, "127.0.0.1 in the kernel's byte order, and nothing else"
        with (
            pytest.raises(OutputError, match="another make quickstart, make sweep or make ui"),
            services.services(tmp_path),
        ):
            pass
        assert ends_cleanly(process, signal.SIGTERM)


>>>>>>> 4a48a17bfb18c52a762039251f6c86f51dd8dfcd
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
