"""k8s/base/tracking, run: its very commands, arguments and environment, on a real PostgreSQL and the embedded S3.

Changed are addresses only: everything binds to loopback, and the two replicas, with one address and a worker each, to two ports.
"""

from __future__ import annotations

import http.client
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

from tests.k8s.expand import expand, substitute
from tests.k8s.invariants import locked
from tests.k8s.kubelet import environment
from tests.k8s.objects import containers
from tests.k8s.render import K8S, Object, lacks, render
from tests.support.processes import ROOT, free_port, wait_for
from warm_dist import supervisor
from warm_dist.store.open import open_store
from warm_dist.store.seaweedfs import S3Server

ARTIFACTS = "s3://warm-dist/mlflow"
HOSTS = ("mlflow", "mlflow.warm-dist", "mlflow.warm-dist.svc", "mlflow.warm-dist.svc.cluster.local")


def manifest(name: str) -> Object:
    """A container of base/tracking's pods, by its name."""
    every = [container for pod in expand(render(K8S / "base" / "tracking")) for container in containers(pod)]
    return next(container for container in every if container["name"] == name)


class Container(NamedTuple):
    """What a kubelet starts: argv and the whole environment."""

    argv: list[str]
    environment: dict[str, str]

    def at(self, port: int) -> Container:
        places = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}", "--workers=2": "--workers=1"}
        assert places.keys() <= set(self.argv)
        return self._replace(argv=[places.get(word, word) for word in self.argv])

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        return supervisor.start(self.argv, self.environment, log, str(ROOT))

    def run(self, log: Path) -> int:
        process = self.start(log)
        try:
            return process.wait(120)
        finally:
            supervisor.stop(process)


class Database:
    """A PostgreSQL of its own, on loopback, with the StatefulSet's user and database."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.folder, self.port, self.password = binaries, folder, free_port(), token_hex(16)
        # the README's, which names the driver: SQLAlchemy 2.1 takes `postgresql:` for one that is not installed
        (uri,) = re.findall(r"--from-literal=uri=(\S+:\$P@postgres:5432/\S+)", (K8S / "README.md").read_text())
        self.uri = uri.replace("$P", self.password).replace("postgres:5432", f"127.0.0.1:{self.port}")
        self.place = ("--host=127.0.0.1", f"--port={self.port}", "--username=mlflow")
        user = pwd.getpwnam("postgres")  # it refuses to be root's
        self.become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        secret = folder / "password"
        secret.write_text(self.password)
        for path in (folder, secret):
            os.chown(path, user.pw_uid, user.pw_gid)
        options = ["--username=mlflow", "--auth=scram-sha-256", f"--pwfile={secret}", "--data-checksums", "--no-sync"]
        self._run("initdb", f"--pgdata={folder / 'data'}", "--encoding=UTF8", *options)
        secret.unlink()

    @contextmanager
    def running(self) -> Iterator[None]:
        options = ["-D", str(self.folder / "data"), "-h", "127.0.0.1", "-p", str(self.port), "-k", "", "-F"]
        command = [*self.become, str(self.binaries / "postgres"), *options]
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        process = supervisor.start(command, env, self.folder.parent / "postgres.log")
        try:
            wait_for("PostgreSQL", lambda: self.ready("postgres"), 60)
            yield
        finally:
            supervisor.stop(process)

    def ready(self, name: str = "mlflow") -> bool:
        """What the StatefulSet's probes say."""
        spec = manifest("postgres")
        probes = [spec[kind]["exec"]["command"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")]
        command = [word.replace("--dbname=mlflow", f"--dbname={name}") for word in probes[0]]
        assert probes == [probes[0]] * 3
        env = {"PGPORT": str(self.port), "PATH": f"{self.binaries}:/usr/bin:/bin"}
        return subprocess.run(command, env=env, capture_output=True).returncode == 0

    def create(self) -> None:
        self._run("createdb", *self.place, "mlflow")

    def ask(self, query: str) -> list[str]:
        return self._run("psql", *self.place, "--dbname=mlflow", "-At", f"--command={query}").splitlines()

    def _run(self, program: str, *arguments: str) -> str:
        command = [*self.become, str(self.binaries / program), *arguments]
        env = {"PGPASSWORD": self.password, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        return done.stdout


class Tracking(NamedTuple):
    """The whole: the database, its Job, and the addresses of both replicas."""

    database: Database
    upgrade: Container
    urls: list[str]
    waited: str


@pytest.fixture(scope="module")
def tracking(s3: S3Server) -> Iterator[Tracking]:
    """First installation: replicas that wait, the Job, then both at once."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found or os.geteuid() != 0:
        lacks("no MLflow on PostgreSQL without it and root; on Debian, as root: apt-get install postgresql")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="warm-dist-tracking-")))
        folder.chmod(0o755)
        (folder / "postgres").mkdir()
        database = Database(found[-1].parent, folder / "postgres")
        stack.enter_context(database.running())
        settings = {"AWS_DEFAULT_REGION": s3.env["AWS_DEFAULT_REGION"], "MLFLOW_S3_ENDPOINT_URL": s3.endpoint_url}
        config_maps = {"settings": settings | {"MLFLOW_ARTIFACTS": ARTIFACTS}}
        secrets = {"mlflow-database": {"uri": database.uri}, "s3-credentials": s3.env}
        here = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(ROOT)}
        parts = []
        for spec in map(manifest, ("schema", "mlflow", "upgrade")):
            env = environment(spec, config_maps, secrets) | here
            words = [*spec["command"], *spec.get("args", [])]
            parts.append(Container([substitute(word, env) for word in words], env))
        schema, server, upgrade = parts

        waiting = schema.start(folder / "schema.log")
        stack.callback(supervisor.stop, waiting)
        said = (folder / "schema.log").read_text
        wait_for("waiting without a database", lambda: "does not exist" in said() or waiting.poll() is not None)
        database.create()
        wait_for("waiting without tables", lambda: "out-of-date" in said() or waiting.poll() is not None)
        waited = said()
        assert upgrade.run(folder / "upgrade.log") == 0, (folder / "upgrade.log").read_text()
        assert waiting.wait(60) == 0, said()

        ports = [free_port(), free_port()]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        servers = [server.at(port).start(folder / f"mlflow-{port}.log") for port in ports]
        for process in servers:
            stack.callback(supervisor.stop, process)
        ended = lambda: [process.poll() for process in servers] != [None, None]  # noqa: E731
        wait_for("MLflow", lambda: ended() or {status(url, "/health") for url in urls} == {200})
        assert not ended(), [path.read_text() for path in folder.glob("mlflow-*.log")]
        yield Tracking(database, upgrade, urls, waited)


def status(url: str, path: str, host: str | None = None) -> int:
    """Of a GET with this Host header; 0 if nobody answers."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        connection.request("GET", path, headers={"Host": host} if host else {})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def test_replicas_wait_until_the_database_is_made(tracking: Tracking) -> None:
    """Both mlflow servers would make the tables of an empty database, without a lock that both see."""
    assert 'database "mlflow" does not exist' in tracking.waited
    assert "out-of-date database schema (found version None" in tracking.waited
    assert tracking.database.password not in tracking.waited


def test_what_one_replica_takes_the_other_has(tracking: Tracking, s3: S3Server) -> None:
    from mlflow import MlflowClient

    one, other = (MlflowClient(url) for url in tracking.urls)
    run_id = one.create_run(one.create_experiment("two-replicas")).info.run_id
    one.log_metric(run_id, "train/loss", 0.25, step=64)
    one.log_text(run_id, "by way of the server", "note.txt")
    assert other.get_run(run_id).data.metrics == {"train/loss": 0.25}
    with TemporaryDirectory() as folder:  # this client has no key to S3 in its hands: the server fetches it
        assert Path(other.download_artifacts(run_id, "note.txt", folder)).read_text() == "by way of the server"
    assert any(path.endswith(f"{run_id}/artifacts/note.txt") for path in open_store(ARTIFACTS, s3.endpoint_url).list())


def test_the_job_does_nothing_to_a_database_of_its_version(tracking: Tracking, tmp_path: Path) -> None:
    """Also while the servers run: a second `kubectl apply` after the Job's time to live."""
    tables = "select table_name || '.' || column_name from information_schema.columns where table_schema = 'public'"
    before = tracking.database.ask(tables), tracking.database.ask("select version_num from alembic_version")
    assert len(before[1]) == 1
    assert tracking.upgrade.run(tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert sorted(before[0]) == sorted(tracking.database.ask(tables))
    assert before[1] == tracking.database.ask("select version_num from alembic_version")
    assert {status(url, "/api/2.0/mlflow/experiments/get?experiment_id=0") for url in tracking.urls} == {200}


def test_the_services_names_are_answered_and_no_others(tracking: Tracking) -> None:
    """MLflow compares the whole header, port included; a probe, which comes by the pod's address, is always answered."""
    path = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    for host in (*(f"{name}:5000" for name in HOSTS), "localhost:8080", "127.0.0.1:5000"):
        assert status(tracking.urls[0], path, host) == 200, host
    for host in ("rebound.example.com", "mlflow.example.com:5000", "10.0.0.7:5000", "localhost.example.com:5000"):
        assert status(tracking.urls[0], path, host) == 403, host
        assert status(tracking.urls[0], "/health", host) == 200, host


def test_the_job_is_named_after_the_projects_mlflow() -> None:
    """A Job cannot be changed: with the same name, the new version's would be refused, or never run."""
    names = {tree["metadata"]["name"] for tree in render(K8S / "base" / "tracking") if tree["kind"] == "Job"}
    assert names == {f"mlflow-database-{locked('mlflow').replace('.', '-')}"}
