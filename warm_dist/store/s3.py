"""S3 through boto3: reads that survive a bad network, and one clear message for each failure.

First requests are retried by boto3 and fail soon. A read of a known object (etag given) is patient, since only the
network can be at fault: it resumes where the last body ended, waits with full jitter, and every byte received extends
its deadline.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
import re
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from warm_dist.deadlines import answers_within
from warm_dist.errors import AccessError, ConfigError, OutputError, UnreachableError
from warm_dist.store.base import Stat, Store, too_short
from warm_dist.store.s3_answers import (
    PIECE_BYTES,
    OddAnswerError,
    Place,
    content_length,
    drain,
    refuse_redirect,
    translated,
)

ATTEMPTS = 5  # per request, by boto3, which never retries a body
CONNECT_S, READ_S = 5, 10  # timeouts of one attempt
ANSWER_S = 60  # limit for the last of a request's attempts, however steadily its answer drips
PRESIGNED_S = 3600  # lifetime of a URL, renewed at half of it
BACKOFF_S, MAX_BACKOFF_S = 0.2, 8.0  # doubles with each failure; the wait is uniform between 0 and that
# A read may take PATIENCE_S plus the time of its bytes so far at SLOWEST. Its last attempt starts at most 8 s later and
# takes 5 + 10 + 30 s: 119 s for a GET of 8 MiB, below parallel.timeout_s, so that a rank reports its storage before its
# peers time out. Four stalls in a row are survived.
PATIENCE_S = 45
SLOWEST = 400_000  # bytes/s


T = TypeVar("T")


class _Answer(NamedTuple):
    """A GET's response. stream: urllib3's. length: bytes."""

    stream: Any
    length: int
    etag: str


class S3Store(Store):
    """A prefix in a bucket.

    credentials: (access key, secret key); None: boto3's own chain, asked again once a server refuses what it gave.
    attempts: per request. Raises ConfigError for a placeholder bucket.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | None = None,
        credentials: tuple[str, str] | None = None,
        attempts: int = ATTEMPTS,
    ) -> None:
        if "your-" in bucket or bucket.startswith("<") or not bucket:
            raise ConfigError(f"s3://{bucket} is a placeholder; set data.manifest and all other s3:// URLs to your own")
        self.bucket, self.endpoint_url = bucket, endpoint_url
        self._where = endpoint_url or "AWS"
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        if endpoint_url:  # outside AWS the metadata service does not exist, and asking for it takes seconds
            os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
        self._given, self._attempts, self._renewing = credentials, attempts, Lock()
        with self._errors(""):
            self._open()

    def _open(self) -> None:
        import boto3

        session = boto3.session.Session(*(self._given or ()))
        found = session.get_credentials()
        self.client, self.streaming = (self._connect(session, attempts) for attempts in (self._attempts, 1))
        self._presigned: dict[str, tuple[str, float]] = {}  # path → URL, monotonic time of its creation
        # last: another thread that sees these keys has the clients that use them
        self._keys = found and found.get_frozen_credentials()

    def _renewed(self, refused: Any) -> bool:
        """Whether there are other credentials than the refused ones, as after a rotation; they are used from now on."""
        with self._renewing:
            if self._given is None and self._keys == refused:
                with self._errors(""):
                    self._open()
            return bool(self._keys != refused)

    def _connect(self, session: Any, attempts: int) -> Any:
        from botocore.config import Config

        client = session.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=session.region_name or "us-east-1",
            config=Config(
                connect_timeout=CONNECT_S,
                read_timeout=READ_S,
                retries={"total_max_attempts": attempts, "mode": "standard"},  # full-jitter backoff
                max_pool_connections=32,
                signature_version="s3v4",  # presigning would use an older one
                s3={"addressing_style": "path" if self.endpoint_url else "auto"},
                # many S3 servers refuse the newer checksums; bodies have Content-MD5, images a crc32
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                proxies={} if _is_loopback(self.endpoint_url) else None,  # a proxy's loopback is another machine's
            ),
        )
        client.meta.events.register_first(
            "needs-retry.s3", lambda response=None, **more: refuse_redirect(response, self._where)
        )
        return client

    def _call(self, path: str, request: Callable[[], T]) -> T:
        """Send a request; once more with renewed credentials, or after what was not an S3 answer."""
        used = self._keys
        try:
            with self._errors(path), answers_within(ANSWER_S):
                return request()
        except AccessError:
            if not self._renewed(used):
                raise
        except OddAnswerError:
            pass
        with self._errors(path), answers_within(ANSWER_S):
            return request()

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        if length == 0:
            return b""
        body, attempts, failures, begun = io.BytesIO(), 0, 0, time.monotonic()
        while True:
            got, attempts = body.tell(), attempts + 1
            try:
                response = self._get(path, start + got, None if length is None else start + length - 1, etag)
            except UnreachableError as error:
                if etag is None:
                    raise
                failure = error
            else:
                etag = etag or response.etag  # a resumed body must come from the same object
                promised = got + response.length
                length = promised if length is None else length
                failure = UnreachableError(f"{self._name(path)}: the body {drain(response.stream, body)}")
                if body.tell() == length:
                    return body.getvalue()
                if body.tell() == promised:
                    raise too_short(self._name(path), start, length, start + promised)
            if time.monotonic() > begun + PATIENCE_S + body.tell() / SLOWEST:
                raise UnreachableError(f"{failure}; given up after {attempts} attempts and {body.tell()} bytes")
            failures = 0 if body.tell() > got else failures + 1
            time.sleep(random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2**failures)))

    def _get(self, path: str, first: int, last: int | None, etag: str | None) -> _Answer:
        """Request the object's bytes from first to last (None: its end)."""
        conditions = {"IfMatch": f'"{etag}"'} if etag else {}
        if first or last is not None:
            conditions["Range"] = f"bytes={first}-{'' if last is None else last}"

        def request() -> _Answer:
            status, headers, stream = self._send_get(path, conditions)
            try:
                return _Answer(stream, content_length(status, headers, first, last), etag or headers["etag"].strip('"'))
            except (KeyError, ValueError) as error:
                stream.close()
                raise self._place(path).odd(error) from None

        return self._call(path, request)

    def _send_get(self, path: str, conditions: dict[str, str]) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers and body of a GET."""
        known = "IfMatch" in conditions
        if known and (answer := self._quick_get(path, conditions)):
            return answer
        client = self.streaming if known else self.client
        response = client.get_object(Bucket=self.bucket, Key=self.prefix + path, **conditions)
        meta = response["ResponseMetadata"]
        return meta["HTTPStatusCode"], meta["HTTPHeaders"], response["Body"]._raw_stream

    def _quick_get(self, path: str, conditions: dict[str, str]) -> tuple[int, Mapping[str, str], Any] | None:
        """get_object with one presigned URL for all ranges of an object, which saves boto3's millisecond per request.

        None if the server refuses: get_object then repeats the request and reports why, or finds new credentials.
        Raises UnreachableError if the server fails.
        """
        from botocore.awsrequest import AWSRequest

        headers = {"If-Match" if name == "IfMatch" else name: value for name, value in conditions.items()}
        url, made = self._presigned.get(path, ("", -math.inf))
        if time.monotonic() > made + PRESIGNED_S / 2:
            place = {"Bucket": self.bucket, "Key": self.prefix + path}
            url = self.streaming.generate_presigned_url("get_object", place, ExpiresIn=PRESIGNED_S)
            self._presigned[path] = url, time.monotonic()
        request = AWSRequest("GET", url, headers, stream_output=True).prepare()
        # the client's own session, with its timeouts, connections, proxies and certificates
        answer = self.streaming._endpoint.http_session.send(request)
        status = answer.status_code
        if status not in (200, 206):
            answer.raw.close()
            if status >= 500 or status == 429:  # an immediate retry would only add to the load
                raise UnreachableError(f"{self._name(path)}: the server failed ({status})")
            self._presigned.pop(path, None)
            return None
        return status, answer.headers, answer.raw

    def held_bytes(self, length: int) -> int:
        return length * 9 // 8 + PIECE_BYTES  # BytesIO grows by an eighth

    def write(self, path: str, data: bytes) -> None:
        md5 = b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        where = {"Bucket": self.bucket, "Key": self.prefix + path}
        self._call(path, lambda: self.client.put_object(**where, Body=data, ContentMD5=md5))

    def write_if(self, path: str, data: bytes, etag: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": f'"{etag}"'}
        where = {"Bucket": self.bucket, "Key": self.prefix + path}

        def request() -> str | None:
            try:
                return str(self.client.put_object(**where, Body=data, **condition)["ETag"]).strip('"')
            except self.client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in (404, 409, 412):  # 404: gone since
                    return None
                raise

        return self._call(path, request)

    def upload(self, path: str, local_file: Path) -> None:
        # not upload_file, which hides the cause of a failure in another exception's text
        def send() -> None:
            with local_file.open("rb") as file:
                self.client.upload_fileobj(file, self.bucket, self.prefix + path)

        self._call(path, send)
        size, expected = self.stat(path).size, local_file.stat().st_size
        if size != expected:
            raise OutputError(f"{self._name(path)}: {size} of {expected} bytes arrived; upload it again")

    def stat(self, path: str) -> Stat:
        def request() -> Stat:
            head = self.client.head_object(Bucket=self.bucket, Key=self.prefix + path)
            try:
                return _stat(head["ContentLength"], head["ETag"])
            except (KeyError, ValueError) as error:
                raise self._place(path).odd(error) from None

        return self._call(path, request)

    def list(self, prefix: str = "") -> dict[str, Stat]:
        return dict(sorted(self._call(prefix, partial(self._list, prefix)).items()))

    def _list(self, prefix: str) -> dict[str, Stat]:
        wanted, found = self.prefix + prefix, dict[str, Stat]()
        paginator = self.client.get_paginator("list_objects_v2")
        for page in paginator.paginate(Bucket=self.bucket, Prefix=wanted):
            try:
                if not (page["Name"] and isinstance(page["IsTruncated"], bool)):  # an empty answer is not an empty list
                    raise ValueError("a list of no bucket")
                for item in page.get("Contents", ()):
                    if not item["Key"].startswith(wanted):
                        raise ValueError("a list of other names")
                    found[item["Key"][len(self.prefix) :]] = _stat(item["Size"], item["ETag"])
            except (KeyError, ValueError) as error:
                raise self._place(prefix).odd(error) from None
        return found

    def delete(self, path: str) -> None:
        self._call(path, lambda: self.client.delete_object(Bucket=self.bucket, Key=self.prefix + path))

    def discard_partials(self, ours: re.Pattern[str]) -> None:
        # some servers do not implement this request, some users may not send it
        with suppress(ConfigError, AccessError), self._errors(""):
            paginator = self.client.get_paginator("list_multipart_uploads")
            pages = paginator.paginate(Bucket=self.bucket, Prefix=self.prefix)
            for item in (item for page in pages for item in page.get("Uploads", ())):
                if ours.fullmatch(item["Key"][len(self.prefix) :]):
                    with suppress(self.client.exceptions.NoSuchUpload):
                        upload = {"Key": item["Key"], "UploadId": item["UploadId"]}
                        self.client.abort_multipart_upload(Bucket=self.bucket, **upload)

    def _name(self, path: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{path}"

    def _place(self, path: str) -> Place:
        return Place(self._name(path), self._where, self.bucket, self._bucket_exists)

    def _bucket_exists(self) -> bool:
        try:
            return bool(self.client.head_bucket(Bucket=self.bucket))
        except Exception as error:
            return getattr(error, "response", {}).get("Error", {}).get("Code") not in ("404", "NoSuchBucket")

    def _errors(self, path: str) -> AbstractContextManager[None]:
        return translated(self._place(path))


def _stat(size: int, etag: str) -> Stat:
    if not 0 <= size < 1 << 63:
        raise ValueError(f"a size of {size} bytes")
    return Stat(size, etag.strip('"'))


def _is_loopback(url: str | None) -> bool:
    host = urlsplit(url or "").hostname or ""
    return host == "localhost" or bool(re.fullmatch(r"127\.\d+\.\d+\.\d+|::1", host))
