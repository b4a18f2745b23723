"""Checks a job before anything is printed: names, and URLs that pods cannot reach or must not expose."""

from __future__ import annotations

import posixpath
import re
from typing import Any
from urllib.parse import urlsplit

from warm_dist.config.load import dump, flatten
from warm_dist.config.run import Config
from warm_dist.config.urls import check_url
from warm_dist.errors import ConfigError, printable, redact

Object = dict[str, Any]
"""A Kubernetes object as loaded from YAML."""
SCRATCH = "/scratch"  # a pod's own disk, deleted with it
NAME = re.compile(
    r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
)  # controllers append to it; a pod's name has at most 63 characters
_LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+|0\.0\.0\.0|::1?")
_RESERVED = {"warm-dist", "mlflow", "postgres", "s3"}  # names of permanent objects, which a job would replace
IMAGE = re.compile(r"[\w.:/-]+(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})")
SOURCES = ("openmoji", "digits")  # part of the image


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` is valid for all objects of a job."""
    if not NAME.fullmatch(name):
        rule = "at most 40 small letters, digits and hyphens, starting with a letter, not ending with a hyphen"
        raise ConfigError(f"name {name!r}: needs {rule}; choose another with --name")
    if name in _RESERVED:
        raise ConfigError(f"name {name!r} belongs to an object that all jobs share; choose another with --name")


def literal(word: str) -> str:
    """An argument as a container gets it: the kubelet reads $(NAME) as a variable, a secret's too, and $$ as $.

    Raises ConfigError for what no manifest can hold.
    """
    if printable(word) != word or "\n" in word:
        raise ConfigError(f"argument {word!r}: holds characters that a manifest cannot hold; choose another")
    return word.replace("$", "$$")


def check_image(image: str | None) -> None:
    """Raises ConfigError unless the image has a digest or a tag other than latest."""
    if image is not None and not IMAGE.fullmatch(image):
        raise ConfigError(f"image {image!r}: needs a tag other than latest, or a digest")


def check_visible(config: Config) -> None:
    """Raises ConfigError for data, servers and folders of a run that a pod cannot reach."""
    check_store("data.manifest", config.data.manifest)
    if config.eval and config.eval.extractor_url and not re.match(r"(s3|https?)://", config.eval.extractor_url):
        raise ConfigError(f"eval.extractor_url {config.eval.extractor_url} is a path, which pods do not have")
    values = flatten(dump(config))
    for key in ("data.endpoint_url", "checkpoint.endpoint_url", "tracking.mlflow_url"):
        check_reachable(key, values[key])
    for key in ("data.cache_dir", "eval.cache_dir"):
        folder = values.get(key)  # eval may be null
        if folder and not posixpath.normpath(folder).startswith(f"{SCRATCH}/"):
            raise ConfigError(f"{key} {folder}: a pod can write below {SCRATCH} only")


def check_secrets(tree: Object) -> None:
    """Raises ConfigError for a password or signed link in a URL: everyone in the namespace can read ConfigMaps."""
    for key, value in flatten(tree).items():
        if key not in ("$schema", "description") and redact(value) != value:
            raise ConfigError(f"{key} {redact(value)}: may hold a secret, which everyone could read in a ConfigMap")


def check_store(key: str, url: str) -> None:
    """Raises ConfigError unless the URL is on S3 and without credentials."""
    check_url(url)
    if not re.match(r"s3://[^/]", url):
        raise ConfigError(f"{key} {url!r}: pods cannot see your folders; use s3://bucket/…")


def check_reachable(key: str, url: str | None) -> None:
    """Raises ConfigError for a server's URL that holds credentials or that pods cannot reach: no http(s), loopback."""
    check_url(url or "")
    if url and not re.match(r"https?://", url):
        raise ConfigError(f"{key} {url}: needs http:// or https://")
    if url and _LOOPBACK.fullmatch(urlsplit(url).hostname or ""):
        raise ConfigError(f"{key} {url}: in a pod this address is the pod itself")
