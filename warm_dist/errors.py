"""Errors a user can meet, each with its exit code, and the one place that turns them into an exit."""

from __future__ import annotations

import errno
import io
import os
import re
import select
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

EXIT_OK = 0
EXIT_UNEXPECTED = 1
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_printed: set[str] = set()
_mute = False
# `user:password@`, in which a password may hold any of /?#@ up to the next URL, or else `token@`. HOST:PORT/a@b is
# neither: localhost, a name with dots or a bracketed address, unless `@` is followed by another HOST:PORT.
_USER = re.compile(
    r"://(?:(?!\[|(?:localhost|[^\s/?#@:]*\.[^\s/?#@:]*):\d{1,5}/(?!\S*@[\w.-]+:\d))"
    r"[^\s/?#:]*:(?:(?!(?:https?|s3|file)://)\S)*@|[^\s/?#@]*@)",
    re.IGNORECASE,
)
_QUERY = re.compile(r"\b(?!(?:s3|file)://)([a-z][\w+.-]*://[^\s?]*)\?\S*", re.IGNORECASE)
_SIGNATURE = re.compile(r"[?&#](?:x-amz-|awsaccesskeyid=|signature=|sig=|\w*token=|password=)\S*", re.IGNORECASE)


class WarmDistError(Exception):
    """A foreseen failure: one clear message, its own exit code, and whether to simply run the same command again."""

    exit_code = EXIT_UNEXPECTED
    resumable = False
    kind = "WarmDistError"
    """What people read before the message: the class that has the exit code."""

    def __init_subclass__(cls, exit_code: int | None = None, resumable: bool | None = None) -> None:
        if exit_code is not None:  # else it is inherited, and the kind with it
            cls.exit_code, cls.resumable, cls.kind = exit_code, False, cls.__name__
        cls.resumable = cls.resumable if resumable is None else resumable


def kind_of(error: BaseException) -> str:
    """What people read before an error's message."""
    return error.kind if isinstance(error, WarmDistError) else type(error).__name__


class ConfigError(WarmDistError, exit_code=2):
    """A configuration or command line that cannot work."""


class DataError(WarmDistError, exit_code=3):
    """Data that differs from its manifest: missing, changed, corrupt or undecodable."""


class MissingError(DataError):
    """An object that does not exist, where the store has answered."""


class CheckpointError(WarmDistError, exit_code=4):
    """A checkpoint that is corrupt, unreadable or from another run."""


class NumericsError(WarmDistError, exit_code=5):
    """A non-finite loss or gradient; the update was not applied."""


class BucketError(WarmDistError, exit_code=6):
    """A bucket that does not exist."""


class AccessError(WarmDistError, exit_code=7):
    """Credentials that are missing, or refused by the storage or by MLflow."""


class OutputError(WarmDistError, exit_code=8):
    """A folder that cannot be written, or a full disk."""


class DiskFullError(OutputError, resumable=True):
    """A full disk or quota: with room made, the same command goes on."""


class WorldSizeError(WarmDistError, exit_code=9):
    """A number of processes that cannot share batch and lanes evenly."""


class PortError(WarmDistError, exit_code=10):
    """A port that is already in use."""


class UnreachableError(WarmDistError, exit_code=11, resumable=True):
    """A server or peer that does not answer. The input is not at fault: the same command can resume later."""


class UnmeasuredError(WarmDistError, exit_code=12):
    """A benchmark of which nothing could be measured."""


class Stopped(WarmDistError, exit_code=75, resumable=True):  # EX_TEMPFAIL of sysexits.h: the same command resumes
    """A requested stop (SIGTERM, Ctrl-C); a checkpoint was saved."""


class PeerError(WarmDistError):
    """Another rank's failure, reported by this one with the same message and exit code."""

    def __init__(self, reason: str, exit_code: int, resumable: bool) -> None:
        super().__init__(reason)
        self.exit_code, self.resumable = exit_code, resumable

    def __reduce__(self) -> tuple[type[PeerError], tuple[str, int, bool]]:
        return PeerError, (str(self), self.exit_code, self.resumable)  # ranks send it to each other


@contextmanager
def writing(target: Path, hint: str = "") -> Iterator[None]:
    """Turn an OSError inside into an OutputError that names `target` and ends with `hint`."""
    try:
        yield
    except OSError as error:
        kind = DiskFullError if error.errno in _FULL else OutputError
        advice = "; make room, and the same command goes on" if kind is DiskFullError else hint
        raise kind(f"{target}: cannot be written ({error.strerror or error}){advice}") from None


def redact(value: Any) -> Any:
    """A copy of a tree or text without what may be secret in its URLs: user, password, query, signature.

    `?` is legal in the keys of s3:// and file://, and stays there unless it begins a signature or token.
    """
    if isinstance(value, dict):
        return {key: redact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    if isinstance(value, str):
        return _SIGNATURE.sub("", _QUERY.sub(r"\1", _USER.sub("://", value)))
    return value


def printable(text: str) -> str:
    """The text with control, format and surrogate characters escaped, line breaks too, which names of files may hold."""
    odd = {c for c in set(text) if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}  # Unicode's categories
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in odd})


def reason(error: BaseException) -> str:
    """Why a library gave up, in one printable line without addresses in memory; the error's type if it does not say."""
    text = re.sub(r"<[\w.]+( object)? at 0x[0-9a-f]+>", "the data", " ".join(str(error).split()))
    return printable(text) or type(error).__name__


def count(number: int, noun: str) -> str:
    """A number and what it counts: `1 shard`, `2 shards`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_error(error: WarmDistError) -> None:
    """Print the error on stderr, printable and without its secrets. A PeerError's message already names its type."""
    prefix = "" if isinstance(error, PeerError) else f"{error.kind}: "
    print_line(f"{prefix}{error}")


def print_line(text: str) -> None:
    """Print text on stderr, printable and without its secrets; where nobody can read it, the program goes on."""
    with suppress(OSError, ValueError):
        print(_shown(text), file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Print text on stdout, without its secrets and with names of people escaped. Raises OSError."""
    print(_shown(text), flush=True)


def _shown(text: str) -> str:
    """Without secrets, each line printable: the line breaks are ours, since messages show names by `printable` or repr."""
    return "\n".join(map(printable, redact(text).split("\n")))


def print_once(text: str, shared: bool = False) -> None:
    """As `print_line`, but each text only once in a process. shared: all ranks say it, and only the first one is heard."""
    if text not in _printed and not (shared and _mute):
        _printed.add(text)
        print_line(text)


def leave_the_word(to_another_rank: bool) -> None:
    """Whether another rank prints the error that ends this one, as is agreed once all have joined."""
    global _mute
    _mute = to_another_rank


def adapt() -> None:
    """Adapt this process, and those that it starts, to the terminal and the network they are in.

    What the terminal's encoding lacks is escaped, and servers on this machine are reached without a proxy.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # None: it was closed
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
    os.environ["PYTHONIOENCODING"] = f"{encoding}:backslashreplace"
    for name in ("no_proxy", "NO_PROXY"):  # either alone is read by some libraries
        hosts = os.environ.get(name) or os.environ.get(name.swapcase(), "")
        missing = [host for host in _LOOPBACK if hosts != "*" and host not in hosts.split(",")]
        os.environ[name] = ",".join([*filter(None, [hosts]), *missing])


def end(error: WarmDistError) -> NoReturn:
    """Print the error, unless another rank does, and end this process with its code, from whatever thread."""
    if not _mute:
        print_error(error)
    with suppress(OSError):
        sys.stdout.flush()
    # at once: a native library's half-started thread can abort the interpreter's teardown with another code
    os._exit(error.exit_code)


def run(main: Callable[[], int | None]) -> None:
    """Run a command and exit with its code, or with one line on stderr and the code of the WarmDistError it raised.

    Of a machine's ranks the first one prints the line, until `leave_the_word`. Where nobody reads stdout any more
    (`| head`), it ends in silence as by SIGPIPE.
    """
    adapt()
    local_rank = os.environ.get("LOCAL_RANK", "").strip()  # no number: said by everyone
    leave_the_word(local_rank.isdecimal() and int(local_rank) > 0)
    try:
        try:
            sys.exit(main() or EXIT_OK)
        except SystemExit:  # of argparse too
            sys.stdout.flush()  # fails here, and not in the interpreter's teardown
            raise
    except WarmDistError as error:
        end(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):
            raise  # another pipe or a socket
        os._exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None and error.errno in _FULL:  # files are written inside `writing`
            end(DiskFullError(f"what this command prints cannot be written ({error.strerror})"))
        raise
