"""Downloads of files: fetched once, kept under their sha256, and checked before every use."""

from __future__ import annotations

import http.client
import os
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from warm_dist.errors import ConfigError, DataError, UnreachableError, writing
from warm_dist.files import file_sha256
from warm_dist.paths import local_path
from warm_dist.store.open import open_store

_BLOCK_BYTES = 1 << 20
_SILENCE_S = 60  # timeout of a silent web server


def fetch(
    source: str,
    sha256: str,
    cache: Path | None = None,
    endpoint_url: str | None = None,
    key: str = "eval.extractor_url",
) -> Path:
    """A local file with this sha256: `source` itself if it is a path, else its download (http, https, s3).

    cache: where downloads are kept, under their hash; None: $XDG_CACHE_HOME/warm-dist, or ~/.cache/warm-dist.
    endpoint_url: S3 endpoint of an s3:// URL; None: AWS. key: the config key to correct, for messages.
    Raises DataError for another hash (nothing is kept), UnreachableError if the server does not deliver, ConfigError
    if there is no such file, OutputError if the cache cannot be written, and what a store raises.
    """
    web = source.startswith(("http://", "https://"))
    if not web and not source.startswith("s3://"):
        try:
            path = Path(local_path(source))
        except ValueError as error:
            raise ConfigError(f"{key} {source!r}: {error}") from None
        if not path.is_file():
            raise ConfigError(f"{key} {source}: no such file")
        _check(path, sha256, source, key)
        return path
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "warm-dist"
    name = urllib.parse.unquote(urllib.parse.urlsplit(source).path) if web else source
    path = cache / sha256 / (Path(name).name or "download")
    if path.is_file() and file_sha256(path) == sha256:
        return path
    with writing(path, "; set XDG_CACHE_HOME to another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # another process may fetch it too
            partial = Path(folder) / path.name
            if web:
                with partial.open("wb") as file:
                    file.writelines(_from_web(source, key))
            else:
                _from_store(source, partial, endpoint_url, key)
            _check(partial, sha256, source, key)
            os.replace(partial, path)
    return path


def _check(path: Path, sha256: str, source: str, key: str) -> None:
    found = file_sha256(path)
    if found != sha256:
        wanted = f"{key.removesuffix('_url')}_sha256 says {sha256}"
        raise DataError(f"{source}: sha256 {found}, {wanted}; nothing of it was loaded: correct the wrong one")


def _from_web(source: str, key: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(source, timeout=_SILENCE_S) as response:
            while block := response.read(_BLOCK_BYTES):
                yield block
            if response.length:  # bytes of Content-Length that are missing
                raise UnreachableError(f"{key} {source}: the body ended {response.length} bytes early; try again")
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an impossible host
        wrong = isinstance(error, ValueError) or (isinstance(error, urllib.error.HTTPError) and error.code < 500)
        raise (ConfigError if wrong else UnreachableError)(f"{key} {source}: {error}") from None


def _from_store(source: str, target: Path, endpoint_url: str | None, key: str) -> None:
    folder, _, name = source.rpartition("/")
    if not name or folder == "s3:/":
        raise ConfigError(f"{key} {source}: needs s3://bucket/key or a local path")
    store = open_store(folder, endpoint_url)
    try:
        store.download(name, target)
    except DataError as error:
        if name in store.list(name):  # it exists, and was replaced or cut short meanwhile
            raise
        raise ConfigError(f"{key} {source}: no such object") from error
