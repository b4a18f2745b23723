"""URLs and paths in configs and on command lines: none holds credentials, which a run's files and messages would tell."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from warm_dist.errors import ConfigError, redact
from warm_dist.paths import local_path, place

CREDENTIALS = (
    "credentials come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role for S3; "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for MLflow"
)


def _without_secrets(url: str) -> str:
    if redact(url) != url:
        raise ValueError(f"holds a user, password, token or query, which a run's files would tell; {CREDENTIALS}")
    return url


def _not_empty(url: str) -> str:
    if not url.strip():
        raise ValueError("needs a URL, not an empty text; null: none")
    return url


def _of_a_server(url: str) -> str:
    with suppress(ValueError):  # a port that is no number, or too large
        parts, one_word = urlsplit(url), url.isprintable() and " " not in url
        if one_word and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    raise ValueError("needs the URL of a server, http://… or https://…")


def _web_or_place(url: str) -> str:
    return url if url.startswith(("http://", "https://")) else place(url)


NoSecrets = AfterValidator(_without_secrets)
URL = Annotated[str, AfterValidator(_not_empty), NoSecrets]
"""A URL without credentials."""
Server = Annotated[URL, AfterValidator(_of_a_server)]
LocalPath = Annotated[str, NoSecrets, AfterValidator(local_path)]
Place = Annotated[str, NoSecrets, AfterValidator(place)]
Download = Annotated[str, NoSecrets, AfterValidator(_web_or_place)]
"""A Place, or a web server's URL."""


def check_url(url: str, server: bool = False, flag: str = "") -> str:
    """Return a URL or path from a command line. Raises ConfigError if it holds credentials, or is no server's."""
    try:
        return _of_a_server(_without_secrets(url)) if server else _without_secrets(url)
    except ValueError as error:
        raise ConfigError(f"{flag} {redact(url)}: {error}".lstrip()) from None
