"""Folders, files and URLs as people write them, in configs and on command lines: read in one way everywhere."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from urllib.parse import unquote

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # of one slash too: all that pathlib leaves


def local_path(text: str) -> str:
    """A path on this machine: `~` is a home folder, and file:///… is percent-decoded once. Raises ValueError for others."""
    path = place(text)
    if found := _SCHEME.match(path):
        where = "only data.manifest, checkpoint.url and a sweep's output may be on S3"
        raise ValueError(f"needs a folder or file of this machine, not {found[1]}:; {where}")
    return path


def place(text: str) -> str:
    """As `local_path`, or an s3:// URL as it is: `#`, `?` and `%` stand for themselves in its key."""
    if not text.strip():
        raise ValueError("needs a folder, file or URL, not an empty text")
    if "\0" in text:
        raise ValueError("needs a folder, file or URL, which never holds NUL")
    if found := _SCHEME.match(text):
        if found[1] == "s3" and re.match("s3://[^/]", text):
            return text
        if found[1] != "file":
            raise ValueError("needs s3://bucket/prefix or a path on this machine")
    if not text.startswith("file:"):
        return _home(text)
    found = re.fullmatch(r"file:(?://(?:localhost)?)?(/.*)", text, re.DOTALL)
    if not found or found[1].startswith("//"):
        raise ValueError("needs the form file:///folder/name: a file of this machine, by its whole path")
    return unquote(found[1])


def _home(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise ValueError(f"names the home folder {path.split('/')[0]}, which this machine does not have") from None


def path_argument(text: str) -> Path:
    """A word of the command line as a path on this machine, for argparse."""
    try:
        return Path(local_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def place_argument(text: str) -> str:
    """A word of the command line as a path or URL, for argparse."""
    try:
        return place(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
