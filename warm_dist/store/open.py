"""Opens the store at a URL or a folder's path."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from warm_dist.config.urls import check_url
from warm_dist.errors import ConfigError
from warm_dist.store.base import Store
from warm_dist.store.folder import FolderStore


def open_store(url: str, endpoint_url: str | None = None) -> Store:
    """Open `s3://bucket/prefix`, `file:///folder` or a folder's path, without access to network or disk.

    endpoint_url: S3 endpoint; None: AWS. Credentials come from boto3's own chain.
    Raises ConfigError for a placeholder bucket, an unknown scheme or credentials in a URL.
    """
    for text in (url, endpoint_url):
        check_url(text or "")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FolderStore(Path(url))
    if scheme == "file":
        return FolderStore(Path(urlsplit(url).path))
    if scheme != "s3":
        raise ConfigError(f"{url}: unknown scheme {scheme!r}; use s3://bucket/prefix or a local path")
    from warm_dist.store.s3 import S3Store

    bucket, _, prefix = rest.partition("/")
    return S3Store(bucket, prefix, endpoint_url)
