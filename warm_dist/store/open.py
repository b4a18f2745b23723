"""Opens the store at a URL or a folder's path."""

from __future__ import annotations

from pathlib import Path

from warm_dist.config.urls import check_url
from warm_dist.errors import ConfigError
from warm_dist.paths import place
from warm_dist.store.base import Store
from warm_dist.store.folder import FolderStore


def open_store(url: str, endpoint_url: str | None = None) -> Store:
    """Open `s3://bucket/prefix`, `file:///folder` or a folder's path, without access to network or disk.

    endpoint_url: S3 endpoint; None: AWS. Credentials come from boto3's own chain.
    Raises ConfigError for a placeholder bucket or what is no such place.
    """
    check_url(url)
    if endpoint_url == "":
        raise ConfigError(f"{url}: its endpoint URL is an empty text; leave it out for AWS's own")
    if endpoint_url is not None:
        check_url(endpoint_url, server=True)
    try:
        path = place(url)
    except ValueError as error:
        raise ConfigError(f"{url!r}: {error}") from None
    if not path.startswith("s3://"):
        return FolderStore(Path(path))
    from warm_dist.store.s3 import S3Store

    bucket, _, prefix = path.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, endpoint_url)
