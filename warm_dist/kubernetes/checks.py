"""What a pod cannot see, name or keep secret is refused before anything is printed."""

from __future__ import annotations

import posixpath
import re
from typing import Any
from urllib.parse import urlsplit

from warm_dist.config.load import dump, flatten
from warm_dist.config.run import Config
from warm_dist.errors import ConfigError, redact

Object = dict[str, Any]
"""A Kubernetes object, as YAML has it."""
SCRATCH = "/scratch"  # a pod's own disk, gone with it
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # with what controllers add to it, a pod's name has at most 63
_LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+|0\.0\.0\.0|::1?")
_RESERVED = {"warm-dist", "mlflow", "postgres", "s3"}  # of standing objects, one of which a job would replace
IMAGE = re.compile(r"[\w.:/-]+(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})")
SOURCES = ("openmoji", "digits")  # that the image brings


def check_name(name: str) -> None:
    """Raises ConfigError unless all objects of a job can be called after it."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"name {name!r}: needs at most 40 small letters, digits and hyphens, the first a letter, the last no hyphen; "
            "--name gives another"
        )
    if name in _RESERVED:
        raise ConfigError(f"name {name!r} is that of an object which all jobs share; --name gives another")


def check_image(image: str | None) -> None:
    """Raises ConfigError unless it is a name with a tag, not latest, or a digest."""
    if image is not None and not IMAGE.fullmatch(image):
        raise ConfigError(f"image {image!r}: needs a tag other than latest, or a digest")


def check_visible(config: Config) -> None:
    """Raises ConfigError for what a run reads or speaks to and a pod cannot see."""
    check_store("data.manifest", config.data.manifest)
    if config.eval and config.eval.extractor_url and not re.match(r"(s3|https?)://", config.eval.extractor_url):
        raise ConfigError(f"eval.extractor_url {config.eval.extractor_url} is a path, and no pod has it")
    values = flatten(dump(config))
    for key in ("data.endpoint_url", "checkpoint.endpoint_url", "tracking.mlflow_url"):
        check_reachable(key, values[key])
    for key in ("data.cache_dir", "eval.cache_dir"):
        folder = values.get(key)  # there is no eval.cache_dir without eval
        if folder and not posixpath.normpath(folder).startswith(f"{SCRATCH}/"):
            raise ConfigError(f"{key} {folder}: a pod can write below {SCRATCH} only")


def check_secrets(tree: Object) -> None:
    """Raises ConfigError for a password or a signed link in an URL: everybody in the namespace reads ConfigMaps."""
    for key, value in flatten(tree).items():
        if key not in ("$schema", "description") and redact(value) != value:
            raise ConfigError(f"{key} {redact(value)}: may hold a secret, which everybody could read in a ConfigMap")


def check_store(key: str, url: str) -> None:
    if not re.match(r"s3://[^/]", url):
        raise ConfigError(f"{key} {url!r}: a pod has no folder of yours; it needs s3://bucket/…")


def check_reachable(key: str, url: str | None) -> None:
    if url and not re.match(r"https?://", url):
        raise ConfigError(f"{key} {url}: needs http:// or https://")
    if url and _LOOPBACK.fullmatch(urlsplit(url).hostname or ""):
        raise ConfigError(f"{key} {url}: in a pod that address is the pod itself")
