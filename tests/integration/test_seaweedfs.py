"""The embedded S3 server, the real one."""

from __future__ import annotations

import http.client
import os
import pwd
import signal
import ssl
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import psutil
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


def sockets(server: S3Server) -> tuple[set[tuple[str, int]], set[str]]:
    """What the running server listens on: addresses with ports, and Unix sockets."""
    weed = psutil.Process(int((server.directory / "s3.lock").read_text().partition(":")[0])).children()[0]
    tcp = {tuple(found.laddr) for found in weed.net_connections("tcp") if found.status == psutil.CONN_LISTEN}
    return tcp, {found.laddr for found in weed.net_connections("unix") if found.laddr}


def answered(url: str, method: str) -> bool:
    """Whether a request without credentials, with TLS or without, is answered as asked."""
    data = b"x" if method in ("PUT", "POST") else None
    request = urllib.request.Request(url, data, method=method)
    try:
        urllib.request.urlopen(request, timeout=10, context=ssl._create_unverified_context()).close()
    except urllib.error.HTTPError as error:
        return error.code not in (400, 403, 405)  # 404: it would have been given
    except (OSError, http.client.HTTPException):
        return False
    return True


def test_no_port_lets_in_who_has_no_credentials(s3: S3Server) -> None:
    """Fault: the filer's port takes list, read, write and delete from every user of the machine, as do the others'."""
    connect(s3).write("secret", b"kept")
    tcp, _ = sockets(s3)
    assert {address for address, _ in tcp} == {"127.0.0.1"}
    first = int(s3.endpoint_url.rsplit(":", 1)[1])
    ports = {port for _, port in tcp}
    assert ports == {first + step + k for step in (0, 10_000) for k in range(5)}
    asked = [("GET", "/"), ("GET", "/dir/assign"), ("GET", "/dir/lookup?volumeId=1"), ("GET", "/vol/status")]
    asked += [("GET", "/cluster/status"), ("GET", "/ui/index.html"), ("GET", "/1,01637037d6"), ("POST", "/submit")]
    asked += [("GET", "/buckets/"), ("POST", "/?Action=ListUsers&Version=2010-05-08"), ("GET", "/api/users")]
    for folder in (f"/buckets/{s3.bucket}", f"/{s3.bucket}"):  # the filer's, S3's
        asked += [("GET", f"{folder}/"), *((method, f"{folder}/secret") for method in ("GET", "PUT", "DELETE"))]
    urls = [f"{scheme}://127.0.0.1:{port}" for scheme in ("http", "https") for port in sorted(ports)]
    assert [(method, url + path) for url in urls for method, path in asked if answered(url + path, method)] == []
    assert connect(s3).read("secret") == b"kept"


def test_no_grpc_port_lets_in_who_has_no_certificate(s3: S3Server) -> None:
    """Fault: the filer's gRPC port lists the users with their keys."""
    methods = ("filer_pb.SeaweedFiler/GetFilerConfiguration", "master_pb.Seaweed/Assign",
               "iam_pb.SeaweedIdentityAccessManagement/ListUsers", "volume_server_pb.VolumeServer/VolumeServerStatus",
               "worker_pb.WorkerService/WorkerStream")  # fmt: skip
    others = grpc.ssl_channel_credentials(seaweedfs._self_signed("127.0.0.1"))  # trusts the server as little
    for port in (port for _, port in sockets(s3)[0]):
        for channel in (grpc.insecure_channel(f"127.0.0.1:{port}"), grpc.secure_channel(f"127.0.0.1:{port}", others)):
            with channel:
                for method in methods:
                    with pytest.raises(grpc.RpcError) as refused:
                        channel.unary_unary(f"/{method}")(b"", timeout=5)
                    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE, (port, method)


def test_no_other_user_reads_its_files_or_opens_its_sockets(s3: S3Server) -> None:
    assert stat.S_IMODE(s3.directory.stat().st_mode) == 0o700
    _, unix = sockets(s3)
    assert unix
    assert {oct(stat.S_IMODE(os.stat(path).st_mode) & 0o077) for path in unix} == {"0o0"}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody").pw_uid
        for path in (s3.directory / "s3.json", s3.directory / "tls.pem", s3.directory / "data"):
            assert subprocess.run(
                ["ls", path], user=nobody, group=nobody, extra_groups=[], check=False, capture_output=True
            ).returncode


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
