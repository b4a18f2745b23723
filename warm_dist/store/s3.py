"""S3 by way of boto3, the only place with it: reads that survive a bad network, and one message for each failure.

A first contact is retried by boto3 and fails soon. A read of a known object (etag given) is patient, since then nothing
but the network can be at fault: it goes on where the last body broke off, waits with full jitter, and each byte that came
buys it more time.
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

from warm_dist.errors import AccessError, BucketError, ConfigError, DataError, OutputError, UnreachableError
from warm_dist.store.base import Stat, Store, too_short

ATTEMPTS = 5  # of one request, by boto3, which never repeats a body
CONNECT_S, READ_S = 5, 10  # silence after which an attempt is given up
BODY_S = 30  # a body that takes longer is a trickle; another connection may be faster
PRESIGNED_S = 3600  # life of a URL; renewed at half of it
BACKOFF_S, MAX_BACKOFF_S = 0.2, 8.0  # doubles with each failure; the wait is uniform between 0 and that
# A read is given up after PATIENCE_S, and what its bytes so far need at SLOWEST. The last attempt begins at most 8 s later
# and takes 5 + 10 + 30 s: 119 s for a GET of 8 MiB, less than parallel.timeout_s, so that a rank names its storage before
# its peers miss it. Four stalls in a row are survived.
PATIENCE_S = 45
SLOWEST = 400_000  # bytes a second
_PIECE_BYTES = 256 << 10  # read from a body at once


class _Answer(NamedTuple):
    """stream: urllib3's response. length: in bytes."""

    stream: Any
    length: int
    etag: str


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
        self._presigned: dict[str, tuple[str, float]] = {}  # path → URL, and when it was made
        with self._errors(""):
            session = self._session(credentials)
            self.client, self.streaming = (self._connect(session, attempts) for attempts in (self.attempts, 1))

    def _session(self, credentials: tuple[str, str] | None) -> Any:
        import boto3

        if self.endpoint_url:  # elsewhere than at AWS nobody answers the metadata service, and asking it takes seconds
            os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
        return boto3.session.Session(*(credentials or ()))

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
                signature_version="s3v4",  # presigning would take an older one
                s3={"addressing_style": "path" if self.endpoint_url else "auto"},
                # the newer checksums are refused by many S3 servers; bodies carry Content-MD5, images a crc32
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
        """The object's bytes from first to last (None: its end), still to be read."""
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
        """get_object by one presigned URL for all ranges of an object: boto3 spends a millisecond on every other request.

        None if the server refuses: get_object is to ask again and find the words, or new credentials. Raises
        UnreachableError if the server fails.
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
            if status >= 500 or status == 429:  # asking again at once would only add to the load
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

    def discard_partials(self, ours: re.Pattern[str]) -> None:
        # not every server knows this request, nor may everybody send it
        with suppress(ConfigError, AccessError), self._errors(""):
            pages = self.client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for item in page.get("Uploads", ()):
                    if not ours.fullmatch(item["Key"][len(self.prefix) :]):
                        continue
                    with suppress(self.client.exceptions.NoSuchUpload):
                        self.client.abort_multipart_upload(
                            Bucket=self.bucket, Key=item["Key"], UploadId=item["UploadId"]
                        )

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
        from urllib3.exceptions import HTTPError  # boto3 lets it through when an error's own body breaks off

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
        except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, HTTPError) as error:
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
        if (status >= 500 and status != 501) or status == 429:  # 501: this server never will
            return UnreachableError(f"{name}: the server failed ({status} {code})")
        return ConfigError(f"{name}: the server refuses the request ({status} {code})")


def _drain(stream: Any, out: io.BytesIO) -> str:
    """Copy what comes of a body; returns how it ended, which is no failure if all has come. The connection may be reused."""
    from urllib3.exceptions import HTTPError

    deadline = time.monotonic() + BODY_S
    try:
        # read1 returns what has arrived; urllib3's read(n) waits for n bytes, however slowly they trickle
        while piece := stream.read1(_PIECE_BYTES):
            out.write(piece)
            if time.monotonic() > deadline:
                return f"took longer than {BODY_S} s"
    except (HTTPError, OSError) as error:
        return f"broke off ({type(error).__name__})"
    finally:
        stream.close()
    return "ended early"
