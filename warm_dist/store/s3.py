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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from warm_dist.errors import (
    AccessError,
    BucketError,
    ConfigError,
    DataError,
    MissingError,
    OutputError,
    UnreachableError,
)
from warm_dist.store.base import Stat, Store, too_short

ATTEMPTS = 5  # per request, by boto3, which never retries a body
CONNECT_S, READ_S = 5, 10  # timeouts of one attempt
BODY_S = 30  # limit for one body; another connection may be faster
PRESIGNED_S = 3600  # lifetime of a URL, renewed at half of it
BACKOFF_S, MAX_BACKOFF_S = 0.2, 8.0  # doubles with each failure; the wait is uniform between 0 and that
# A read may take PATIENCE_S plus the time of its bytes so far at SLOWEST. Its last attempt starts at most 8 s later and
# takes 5 + 10 + 30 s: 119 s for a GET of 8 MiB, below parallel.timeout_s, so that a rank reports its storage before its
# peers time out. Four stalls in a row are survived.
PATIENCE_S = 45
SLOWEST = 400_000  # bytes/s
_PIECE_BYTES = 256 << 10  # per read from a body
_KEYS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE"


class _Answer(NamedTuple):
    """A GET's response. stream: urllib3's. length: bytes."""

    stream: Any
    length: int
    etag: str


class S3Store(Store):
    """A prefix in a bucket.

    credentials: (access key, secret key); None: boto3's own chain. attempts: per request. Raises ConfigError for a
    placeholder bucket.
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
        self._presigned: dict[str, tuple[str, float]] = {}  # path → URL, monotonic time of its creation

        import boto3

        if endpoint_url:  # outside AWS the metadata service does not exist, and asking for it takes seconds
            os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
        with self._errors(""):
            session = boto3.session.Session(*(credentials or ()))
            self.client, self.streaming = (self._connect(session, attempts) for attempts in (attempts, 1))

    def _connect(self, session: Any, attempts: int) -> Any:
        from botocore.config import Config

        return session.client(
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
            ),
        )

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
                failure = UnreachableError(f"{self._name(path)}: the body {_drain(response.stream, body)}")
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
        with self._errors(path):
            if etag and (answer := self._quick_get(path, conditions, etag)):
                return answer
            client = self.streaming if etag else self.client
            response = client.get_object(Bucket=self.bucket, Key=self.prefix + path, **conditions)
        return _Answer(response["Body"]._raw_stream, response["ContentLength"], response["ETag"].strip('"'))

    def _quick_get(self, path: str, conditions: dict[str, str], etag: str) -> _Answer | None:
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
        return _Answer(answer.raw, int(answer.headers["Content-Length"]), etag)

    def held_bytes(self, length: int) -> int:
        return length * 9 // 8 + _PIECE_BYTES  # BytesIO grows by an eighth

    def write(self, path: str, data: bytes) -> None:
        md5 = b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        with self._errors(path):
            self.client.put_object(Bucket=self.bucket, Key=self.prefix + path, Body=data, ContentMD5=md5)

    def upload(self, path: str, local_file: Path) -> None:
        # not upload_file, which hides the cause of a failure in another exception's text
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
        with self._errors(prefix):
            paginator = self.client.get_paginator("list_objects_v2")
            pages = paginator.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
            items = [item for page in pages for item in page.get("Contents", ())]
        found = {item["Key"][len(self.prefix) :]: Stat(item["Size"], item["ETag"].strip('"')) for item in items}
        return dict(sorted(found.items()))

    def delete(self, path: str) -> None:
        with self._errors(path):
            self.client.delete_object(Bucket=self.bucket, Key=self.prefix + path)

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

    def _bucket_is_missing(self) -> bool:
        try:
            return not self.client.head_bucket(Bucket=self.bucket)
        except Exception as error:
            return getattr(error, "response", {}).get("Error", {}).get("Code") in ("404", "NoSuchBucket")

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Translate boto3's exceptions, without the server's messages: some servers repeat credentials in them."""
        from botocore import exceptions as boto
        from urllib3.exceptions import HTTPError  # passed through by boto3 if an error's body ends early

        try:
            yield
        except boto.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            raise self._translate(path, code, status) from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError):
            raise AccessError(f"{self._name(path)}: no usable S3 credentials found; {_KEYS}") from None
        except (boto.ProfileNotFound, boto.SSOError) as error:
            raise AccessError(f"{self._name(path)}: {type(error).__name__}; {_KEYS}") from None
        except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, HTTPError) as error:
            raise UnreachableError(
                f"{self._name(path)}: {self._where} does not answer ({type(error).__name__})"
            ) from None
        except (boto.ParamValidationError, ValueError) as error:
            raise ConfigError(f"{self._name(path)}: refused by boto3 ({' '.join(str(error).split())})") from None

    def _translate(self, path: str, code: str, status: int) -> Exception:
        name = self._name(path)
        # a HEAD's response does not say what is missing, and a PUT to a missing bucket can be "forbidden"
        if code == "NoSuchBucket" or (code in ("404", "AccessDenied") and self._bucket_is_missing()):
            return BucketError(
                f"bucket {self.bucket!r} does not exist at {self._where}; create it or correct {self.url}"
            )
        if code in ("NoSuchKey", "404"):
            return MissingError(f"{name}: does not exist")
        if status == 412:
            return DataError(f"{name}: was replaced since it was first read")
        if status == 416:
            return DataError(f"{name}: ends before the requested bytes")
        if status in (301, 307) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
            return ConfigError(f"bucket {self.bucket!r} is in another region; set AWS_DEFAULT_REGION to it")
        if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
            return AccessError(f"{name}: {self._where} refuses these credentials ({code}); {_KEYS}")
        if (status >= 500 and status != 501) or status == 429:  # 501: not implemented
            return UnreachableError(f"{name}: the server failed ({status} {code})")
        return ConfigError(f"{name}: the server refuses the request ({status} {code})")


def _drain(stream: Any, out: io.BytesIO) -> str:
    """Copy a body as far as it arrives and return how it ended, which is no failure if all of it arrived."""
    from urllib3.exceptions import HTTPError

    deadline = time.monotonic() + BODY_S
    try:
        # read1 returns what has arrived; urllib3's read(n) waits for n bytes, however slow
        while piece := stream.read1(_PIECE_BYTES):
            out.write(piece)
            if time.monotonic() > deadline:
                return f"took longer than {BODY_S} s"
    except (HTTPError, OSError) as error:
        return f"broke off ({type(error).__name__})"
    finally:
        stream.close()
    return "ended early"
