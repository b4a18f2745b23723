"""Errors a user can meet, each with its own exit code, and the one place that turns them into an exit."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

EXIT_OK = 0
EXIT_UNEXPECTED = 1


class WarmDistError(Exception):
    """A foreseen end: one clear message, a distinct exit code, and whether the same command may simply be run again."""

    exit_code = EXIT_UNEXPECTED
    resumable = False


class ConfigError(WarmDistError):
    """A configuration or command line that cannot work."""

    exit_code = 2


class DataError(WarmDistError):
    """Data that is not what the manifest promises: missing, changed, corrupt, undecodable."""

    exit_code = 3


class CheckpointError(WarmDistError):
    """A checkpoint that is corrupt, foreign or unreadable."""

    exit_code = 4


class NumericsError(WarmDistError):
    """A non-finite loss or gradient; the update was not applied."""

    exit_code = 5


class BucketError(WarmDistError):
    """A bucket that does not exist."""

    exit_code = 6


class AccessError(WarmDistError):
    """Storage that refuses these credentials, or no credentials at all."""

    exit_code = 7


class OutputError(WarmDistError):
    """A folder that cannot be written, or a full disk."""

    exit_code = 8


class WorldSizeError(WarmDistError):
    """A number of processes among which batch and lanes cannot be dealt."""

    exit_code = 9


class PortError(WarmDistError):
    """A port that is already in use."""

    exit_code = 10


class UnreachableError(WarmDistError):
    """A server or a peer that does not answer; nothing is wrong with the input, so the same command may go on later."""

    exit_code = 11
    resumable = True


class Stopped(WarmDistError):
    """A stop that somebody asked for (SIGTERM, Ctrl-C); a checkpoint was saved."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
    resumable = True


class PeerError(WarmDistError):
    """Another rank's end, told by this one: its message and its exit code."""

    def __init__(self, reason: str, exit_code: int, resumable: bool) -> None:
        super().__init__(reason)
        self.exit_code, self.resumable = exit_code, resumable

    def __reduce__(self) -> tuple[type[PeerError], tuple[str, int, bool]]:
        return PeerError, (str(self), self.exit_code, self.resumable)  # it travels between ranks


def redact(value: Any) -> Any:
    """The same tree or text without what may be secret in an URL: user, password, query (signed links), fragment."""
    if isinstance(value, dict):
        return {key: redact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\w://[^\s?#]*)[?#]\S*", r"\1", re.sub(r"(\w://)[^/\s?#]*@", r"\1", value))
    return value


def print_error(error: WarmDistError) -> None:
    """The one line on stderr; a peer's error carries its own kind's name."""
    prefix = "" if isinstance(error, PeerError) else f"{type(error).__name__}: "
    print(f"{prefix}{redact(str(error))}", file=sys.stderr, flush=True)


def run(main: Callable[[], int | None], quiet: bool = False) -> None:
    """Run a command and exit: with its code, or with one line on stderr and the code of the WarmDistError it raised.

    quiet: leave the line to another rank.
    """
    try:
        sys.exit(main() or EXIT_OK)
    except WarmDistError as error:
        if not quiet:
            print_error(error)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _leave(code: int) -> NoReturn:
    """End at once: ours is closed by now, and a native library's thread, met half-started by the interpreter's teardown,
    may abort the process with a code of its own ("terminate called without an active exception", seen once in a hundred)."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
