"""The embedded S3 server, the real one."""

from __future__ import annotations

import http.client
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from warm_dist import supervisor
from warm_dist.errors import OutputError, PortError, UnreachableError
from warm_dist.store import seaweedfs
from warm_dist.store.s3 import S3Store
from warm_dist.store.seaweedfs import S3Server


def connect(server: S3Server) -> S3Store:
    keys = (server.env["AWS_ACCESS_KEY_ID"], server.env["AWS_SECRET_ACCESS_KEY"])
    return S3Store(server.bucket, "", server.endpoint_url, keys, attempts=2)


def test_data_and_credentials_survive_a_restart_and_the_server_does_not_survive_its_owner(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from warm_dist.store.seaweedfs import S3Server\n"
        "with S3Server(Path(sys.argv[1]), 'bucket') as s3: print(s3.endpoint_url, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        url = owner.stdout.readline().strip()
        assert url
        running = (tmp_path / "s3.lock").read_text()
        assert supervisor.alive(running)
        with pytest.raises(OutputError, match="another S3 server is using it"):
            S3Server(tmp_path, "bucket").__enter__()
        keys = seaweedfs.S3Server(tmp_path, "bucket")._credentials()
        S3Store("bucket", "", url, keys).write("a", b"kept")
        owner.send_signal(signal.SIGKILL)
    with S3Server(tmp_path, "bucket") as server:  # waits for the orphan's end by itself
        assert not supervisor.alive(running)
        assert (server.env["AWS_ACCESS_KEY_ID"], server.env["AWS_SECRET_ACCESS_KEY"]) == keys
        assert connect(server).read("a") == b"kept"
    with pytest.raises(UnreachableError):
        connect(server).read("a")


def test_credentials_are_private_and_anonymous_requests_are_refused(s3: S3Server) -> None:
    assert stat.S_IMODE((s3.directory / "s3.json").stat().st_mode) == 0o600
    assert s3.env["AWS_SECRET_ACCESS_KEY"] not in (s3.directory / "s3.log").read_text()
    host = s3.endpoint_url.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/warm-dist?list-type=2")
    assert connection.getresponse().status == 403
    connection.close()


def test_it_listens_on_loopback_only(s3: S3Server) -> None:
    port = int(s3.endpoint_url.rsplit(":", 1)[1])
    ports = {base + step for base in range(port, port + 5) for step in (0, 10_000)}
    listening = []
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "00000000000000000000000001000000")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, local_port = line.split()[1].split(":")
            if line.split()[3] == "0A" and int(local_port, 16) in ports:
                listening.append(address == loopback)
    assert listening
    assert all(listening)


def test_a_port_in_use_is_named(s3: S3Server, tmp_path: Path) -> None:
    port = int(s3.endpoint_url.rsplit(":", 1)[1])
    with pytest.raises(PortError, match=f"port {port}"):
        S3Server(tmp_path, "bucket", port).__enter__()
    with pytest.raises(PortError, match="port 60000: must be below 55000"):
        S3Server(tmp_path, "bucket", 60_000)


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weed = tmp_path / "weed"
    weed.write_text("#!/bin/sh\necho the disk is made of cheese; exit 3\n")
    weed.chmod(0o755)
    monkeypatch.setattr(seaweedfs, "_find_weed", lambda: weed)
    started = time.monotonic()
    with pytest.raises(UnreachableError, match="the disk is made of cheese"):
        S3Server(tmp_path / "s3", "bucket").__enter__()
    assert time.monotonic() - started < seaweedfs.START_S


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Fault: an OSError that is not turned into OutputError."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        S3Server(tmp_path / "file", "bucket").__enter__()
