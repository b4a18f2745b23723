"""One small interface to S3 and to local folders, and one clear message for each way that storage fails. Only place with boto3."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from warm_dist.errors import AccessError, BucketError, ConfigError, DataError, OutputError, UnreachableError

ATTEMPTS = 5  # of a request, and of a body: boto3 repeats requests but never a body
BACKOFF_S = 0.2  # doubles with each attempt; the wait is uniform between 0 and that
CONNECT_S, READ_S = 5, 30  # silence after which a request is given up
PIECE_BYTES = 32 << 20  # of a download
PARTIAL = ".partial"  # the name of a file until it is whole


class Stat(NamedTuple):
    """Size in bytes and the tag that changes whenever the object is replaced."""

    size: int
    etag: str


def open_store(url: str, endpoint_url: str | None = None) -> Store:
    """A store for `s3://bucket/prefix`, `file:///folder` or a folder's path; touches neither network nor disk.

    endpoint_url: an S3 endpoint other than AWS's own. Credentials come from boto3's own chain.
    Raises ConfigError for a placeholder bucket or an unknown scheme.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FileStore(Path(url))
    if scheme == "file":
        return FileStore(Path(urlsplit(url).path))
    if scheme != "s3":
        raise ConfigError(f"{url}: unknown scheme {scheme!r}; use s3://bucket/prefix or a local path")
    bucket, _, prefix = rest.partition("/")
    return S3Store(bucket, prefix, endpoint_url)


def split_url(url: str) -> tuple[str, str]:
    """The folder's URL and the last name: `s3://bucket/a/manifest.parquet` → (`s3://bucket/a`, `manifest.parquet`)."""
    folder, separator, name = url.rpartition("/")
    return (folder or "/", name) if separator else (".", name)


class Store(ABC):
    """Objects under one URL. Paths are relative to it and use forward slashes; safe to share between threads."""

    url: str

    @abstractmethod
    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        """`length` bytes from `start` (None: to the end).

        etag: of the only acceptable version. Raises DataError if the object is missing, replaced or too short.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Create or replace an object at once: readers see the old one or the new one, never a part."""

    @abstractmethod
    def upload(self, path: str, local_file: Path) -> None:
        """`write` for a file of any size, which need not fit into memory."""

    @abstractmethod
    def stat(self, path: str) -> Stat:
        """Size and tag. Raises DataError if there is no such object."""

    @abstractmethod
    def list(self, prefix: str = "") -> dict[str, Stat]:
        """All objects whose paths begin with `prefix`, sorted by path."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove an object; harmless if it does not exist."""

    def download(self, path: str, local_file: Path) -> None:
        """Copy an object of any size to a local file, piece by piece, all from the same version of it."""
        size, etag = self.stat(path)
        with _output(local_file), local_file.open("wb") as out:
            for start in range(0, size, PIECE_BYTES):
                out.write(self.read(path, start, min(PIECE_BYTES, size - start), etag))


class FileStore(Store):
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser()
        self.url = str(self.root)

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        target = self.root / path
        with self._input(target), target.open("rb") as file:
            if etag is not None and self._tag(os.fstat(file.fileno())) != etag:
                raise DataError(f"{target}: was replaced since it was first looked at")
            file.seek(start)
            data = file.read(-1 if length is None else length)
        if length is not None and len(data) < length:
            raise _too_short(str(target), start, length, start + len(data))
        return data

    def write(self, path: str, data: bytes) -> None:
        with self._replacing(path) as partial:
            partial.write_bytes(data)

    def upload(self, path: str, local_file: Path) -> None:
        with self._replacing(path) as partial:
            shutil.copyfile(local_file, partial)

    def stat(self, path: str) -> Stat:
        with self._input(self.root / path):
            stat = (self.root / path).stat()
            return Stat(stat.st_size, self._tag(stat))

    def list(self, prefix: str = "") -> dict[str, Stat]:
        out = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = (Path(folder) / name).relative_to(self.root).as_posix()
                if path.startswith(prefix) and not name.endswith(PARTIAL):
                    with suppress(DataError):  # deleted meanwhile
                        out[path] = self.stat(path)
        return dict(sorted(out.items()))

    def delete(self, path: str) -> None:
        target = self.root / path
        with _output(target):
            target.unlink(missing_ok=True)
        for folder in target.parents:  # S3 knows no empty folders, so none are left here
            if folder == self.root or self.root not in folder.parents:
                break
            try:
                folder.rmdir()
            except OSError:
                break

    @staticmethod
    def _tag(stat: os.stat_result) -> str:
        return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"

    @contextmanager
    def _replacing(self, path: str) -> Iterator[Path]:
        target = self.root / path
        partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
        with _output(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield partial
                with partial.open("rb") as file:
                    os.fsync(file.fileno())  # or a power cut could leave the new name with no content
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

    @staticmethod
    @contextmanager
    def _input(target: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise DataError(f"{target}: does not exist") from None
        except PermissionError:
            raise AccessError(f"{target}: may not be read by this user") from None
        except OSError as error:
            raise DataError(f"{target}: cannot be read ({error.strerror})") from None


class S3Store(Store):
    """A prefix in a bucket. credentials: (access key, secret key) instead of boto3's own chain."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | None = None,
        credentials: tuple[str, str] | None = None,
        attempts: int = ATTEMPTS,
    ) -> None:
        if "your-" in bucket or bucket.startswith("<") or not bucket:
            raise ConfigError(
                f"s3://{bucket} is a placeholder; set data.manifest (and every other s3:// URL) to your own"
            )
        self.bucket, self.endpoint_url, self.attempts = bucket, endpoint_url, attempts
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        with self._errors(""):
            self.client = self._connect(credentials)

    def _connect(self, credentials: tuple[str, str] | None) -> Any:
        import boto3
        from botocore.config import Config

        if self.endpoint_url:  # elsewhere than at AWS nobody answers the metadata service, and asking it takes seconds
            os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
        session = boto3.session.Session(*(credentials or ()))
        return session.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=session.region_name or "us-east-1",
            config=Config(
                connect_timeout=CONNECT_S,
                read_timeout=READ_S,
                retries={"total_max_attempts": self.attempts, "mode": "standard"},  # full-jitter backoff
                max_pool_connections=32,
                s3={"addressing_style": "path" if self.endpoint_url else "auto"},
                # the newer checksums are refused by many S3 servers; bodies carry Content-MD5, images a crc32
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        if length == 0:
            return b""
        data = bytearray()
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(random.uniform(0, min(8.0, BACKOFF_S * 2**attempt)))
            conditions = {"IfMatch": f'"{etag}"'} if etag else {}
            if start or data or length is not None:
                last = "" if length is None else start + length - 1
                conditions["Range"] = f"bytes={start + len(data)}-{last}"
            with self._errors(path):
                response = self.client.get_object(Bucket=self.bucket, Key=self.prefix + path, **conditions)
            etag = etag or response["ETag"].strip('"')  # a resumed body must come from the same object
            promised = len(data) + response["ContentLength"]
            if length is None:
                length = promised
            try:
                for piece in response["Body"].iter_chunks(1 << 16):
                    data += piece
            except (BotoCoreError, HTTPError, OSError) as error:
                reason = type(error).__name__
                continue
            if len(data) == length:
                return bytes(data)
            if len(data) == promised:
                raise _too_short(self._name(path), start, length, start + len(data))
            reason = "body ended early"
        raise UnreachableError(f"{self._name(path)}: the body broke off {self.attempts} times ({reason})")

    def write(self, path: str, data: bytes) -> None:
        md5 = b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        with self._errors(path):
            self.client.put_object(Bucket=self.bucket, Key=self.prefix + path, Body=data, ContentMD5=md5)

    def upload(self, path: str, local_file: Path) -> None:
        # upload_fileobj, since upload_file hides the cause of a failure in the text of another exception
        with self._errors(path), local_file.open("rb") as file:
            self.client.upload_fileobj(file, self.bucket, self.prefix + path)
        size, expected = self.stat(path).size, local_file.stat().st_size
        if size != expected:
            raise OutputError(f"{self._name(path)}: {size} of {expected} bytes arrived; upload it again")

    def stat(self, path: str) -> Stat:
        with self._errors(path):
            head = self.client.head_object(Bucket=self.bucket, Key=self.prefix + path)
            return Stat(head["ContentLength"], head["ETag"].strip('"'))

    def list(self, prefix: str = "") -> dict[str, Stat]:
        out = {}
        with self._errors(prefix):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for item in page.get("Contents", ()):
                    out[item["Key"][len(self.prefix) :]] = Stat(item["Size"], item["ETag"].strip('"'))
        return dict(sorted(out.items()))

    def delete(self, path: str) -> None:
        with self._errors(path):
            self.client.delete_object(Bucket=self.bucket, Key=self.prefix + path)

    def _name(self, path: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{path}"

    def _bucket_is_missing(self) -> bool:
        try:
            return not self.client.head_bucket(Bucket=self.bucket)
        except Exception as error:
            return getattr(error, "response", {}).get("Error", {}).get("Code") in ("404", "NoSuchBucket")

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Translate what boto3 raises. The server's own words are left out: some servers repeat credentials in them."""
        from botocore import exceptions as boto

        where = self.endpoint_url or "AWS"
        keys = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
        try:
            yield
        except boto.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            raise self._translate(path, code, status, keys) from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError):
            raise AccessError(f"{self._name(path)}: no usable S3 credentials found; {keys}") from None
        except (boto.ProfileNotFound, boto.SSOError) as error:
            raise AccessError(f"{self._name(path)}: {type(error).__name__}; {keys}") from None
        except (boto.HTTPClientError, boto.ConnectionError) as error:
            raise UnreachableError(f"{self._name(path)}: {where} does not answer ({type(error).__name__})") from None
        except (boto.ParamValidationError, ValueError) as error:
            raise ConfigError(f"{self._name(path)}: refused by boto3 ({' '.join(str(error).split())})") from None

    def _translate(self, path: str, code: str, status: int, keys: str) -> Exception:
        name = self._name(path)
        # a HEAD's answer does not say what is missing, and a PUT into a missing bucket may be called forbidden
        if code == "NoSuchBucket" or (code in ("404", "AccessDenied") and self._bucket_is_missing()):
            where = self.endpoint_url or "AWS"
            return BucketError(f"bucket {self.bucket!r} does not exist at {where}; create it or correct {self.url}")
        if code in ("NoSuchKey", "404"):
            return DataError(f"{name}: does not exist")
        if status == 412:
            return DataError(f"{name}: was replaced since it was first looked at")
        if status == 416:
            return DataError(f"{name}: is shorter than the bytes asked for")
        if status in (301, 307) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
            return ConfigError(f"bucket {self.bucket!r} lies in another region; set AWS_DEFAULT_REGION to it")
        if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
            return AccessError(f"{name}: {self.endpoint_url or 'AWS'} refuses these credentials ({code}); {keys}")
        if status >= 500 or status == 429:
            return UnreachableError(f"{name}: the server failed {self.attempts} times ({status} {code})")
        return ConfigError(f"{name}: the server refuses the request ({status} {code})")


def _too_short(name: str, start: int, length: int, end: int) -> DataError:
    return DataError(f"{name}: bytes {start} to {start + length} were asked for, it ends at {end}")


@contextmanager
def _output(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror})") from None
