"""What an S3 server answers: its failures as one clear error each, and what no S3 server answers refused."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from warm_dist.errors import AccessError, BucketError, ConfigError, DataError, MissingError, UnreachableError, redact

BODY_S = 30  # limit for one body; another connection may be faster
PIECE_BYTES = 256 << 10  # per read from a body
_KEYS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
_CLOCK = "this machine's clock differs by more than 15 minutes; set it (`date -u` shows it)"


class OddAnswerError(UnreachableError):
    """An answer that S3 does not give; something before the store may have given it."""


class Place(NamedTuple):
    """Where a request goes, for messages. name: of the object. where: the endpoint. bucket_exists: asks the server."""

    name: str
    where: str
    bucket: str
    bucket_exists: Callable[[], bool]

    def odd(self, why: object) -> OddAnswerError:
        """The error for an answer that lacks a header or field (a KeyError), or is otherwise not S3's."""
        what = f"without {why}" if isinstance(why, KeyError) else str(why)
        return OddAnswerError(
            f"{self.name}: not an S3 answer from {self.where} ({what}); check the endpoint URL, and what stands between"
        )


@contextmanager
def translated(place: Place) -> Iterator[None]:
    """Translate boto3's exceptions, without the server's messages: some servers repeat credentials in them."""
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError  # passed through by boto3 if an error's body ends early

    try:
        yield
    except boto.ClientError as error:
        raise _failure(place, error.response, error.operation_name) from None
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError):
        raise AccessError(f"{place.name}: no usable S3 credentials found; {_KEYS}") from None
    except (boto.ProfileNotFound, boto.SSOError) as error:
        raise AccessError(f"{place.name}: {type(error).__name__}; {_KEYS}") from None
    except (ResponseParserError, boto.PaginationError):
        raise place.odd("a body that is not S3's XML") from None
    except boto.SSLError as error:
        raise _certificate(place, str(error)) from None
    except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, HTTPError, TimeoutError) as error:
        reason = str(error) if isinstance(error, TimeoutError) else type(error).__name__
        raise UnreachableError(f"{place.name}: {place.where} does not answer ({reason})") from None
    except (boto.ParamValidationError, ValueError) as error:
        raise ConfigError(f"{place.name}: refused by boto3 ({' '.join(str(error).split())})") from None


def _failure(place: Place, response: Mapping[str, Any], operation: str) -> Exception:
    code = str(response.get("Error", {}).get("Code", "unknown"))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "RequestTimeTooSkewed":
        return AccessError(f"{place.name}: {place.where} refuses the request's time: {_CLOCK}")
    # boto3 puts the status where a body has no code, and makes a 500 of a 200 whose body it cannot parse
    if not code or (code in ("404", "500") and code == str(status) and not operation.startswith("Head")):
        return place.odd(f"{status} without S3's error in its body")
    # a HEAD's response does not say what is missing, and a PUT to a missing bucket can be "forbidden"
    if code == "NoSuchBucket" or (code in ("404", "AccessDenied") and not place.bucket_exists()):
        return BucketError(
            f"bucket {place.bucket!r} does not exist at {place.where}; create it or correct {place.name}"
        )
    if code in ("NoSuchKey", "404"):
        return MissingError(f"{place.name}: does not exist")
    if status == 412:
        return DataError(f"{place.name}: was replaced since it was first read")
    if status == 416:
        return DataError(f"{place.name}: ends before the requested bytes")
    if status in (301, 307) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return ConfigError(f"bucket {place.bucket!r} is in another region; set AWS_DEFAULT_REGION to it")
    if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
        return AccessError(f"{place.name}: {place.where} refuses these credentials ({code}); {_KEYS}")
    if (status >= 500 and status != 501) or status == 429:  # 501: not implemented
        return UnreachableError(f"{place.name}: the server failed ({status} {code})")
    return ConfigError(f"{place.name}: the server refuses the request ({status} {code})")


def _certificate(place: Place, text: str) -> Exception:
    """The error for TLS that fails: a certificate that is not trusted is no outage."""
    if "CERTIFICATE_VERIFY_FAILED" not in text:
        return UnreachableError(f"{place.name}: {place.where} does not speak TLS with this machine")
    reason = re.search(r"certificate verify failed: ([^(]+)", text)
    if "not yet valid" in text or "expired" in text:
        advice = "or " + _CLOCK
    else:
        advice = "set AWS_CA_BUNDLE to the file of your authority's certificates"
    return ConfigError(
        f"{place.name}: the certificate of {place.where} is not trusted ({reason[1].strip() if reason else 'refused'}); {advice}"
    )


def refuse_redirect(response: Any, where: str) -> None:
    """Raise ConfigError for a redirect other than to an AWS region, which boto3 would follow in a circle."""
    if response is None or response[0].status_code not in (301, 302, 303, 307, 308):
        return
    headers = response[0].headers
    if "x-amz-bucket-region" not in headers:
        target = redact(str(headers.get("Location", "an unknown place")))
        raise ConfigError(f"{where} redirects to {target}; set the endpoint URL to the address that answers itself")


def content_length(status: int, headers: Mapping[str, str], first: int, last: int | None) -> int:
    """The length of a GET's body, bytes.

    first, last: of the bytes asked for (last None: the object's end). Raises ValueError if it is of others, KeyError
    if a header is missing.
    """
    length = int(headers["content-length"])
    if status == 200:
        if first or (last is not None and length > last + 1):
            raise ValueError("the whole object, not the bytes asked for")
        return length
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers["content-range"])
    if not found:
        raise ValueError("an unknown form of Content-Range")
    low, high, size = map(int, found.groups())
    end = size - 1 if last is None else min(last, size - 1)
    if (low, high, length) != (first, end, high - low + 1):
        raise ValueError(f"bytes {low} to {high} of {size}, not those asked for")
    return length


def drain(stream: Any, out: io.BytesIO) -> str:
    """Copy a body as far as it arrives and return how it ended, which is no failure if all of it arrived."""
    from urllib3.exceptions import HTTPError

    deadline = time.monotonic() + BODY_S
    try:
        # read1 returns what has arrived; urllib3's read(n) waits for n bytes, however slow
        while piece := stream.read1(PIECE_BYTES):
            out.write(piece)
            if time.monotonic() > deadline:
                return f"took longer than {BODY_S} s"
    except (HTTPError, OSError) as error:
        return f"broke off ({type(error).__name__})"
    finally:
        stream.close()
    return "ended early"
