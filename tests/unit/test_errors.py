"""Errors: one exit code each, no secrets, whole after a journey between ranks."""

from __future__ import annotations

import ast
import errno
import importlib
import io
import itertools
import json
import os
import pickle
import signal
import string
import sys
import time
from urllib.request import proxy_bypass

import pytest

import warm_dist
from tests.support.paths import ROOT
from warm_dist import errors, supervisor
from warm_dist.errors import redact


def test_every_error_travels_between_ranks():
    for error in (
        errors.PeerError("gone", 11, True),
        *(kind("x") for kind in errors.WarmDistError.__subclasses__() if kind is not errors.PeerError),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.exit_code, again.resumable) == (
            type(error),
            str(error),
            error.exit_code,
            error.resumable,
        )


@pytest.mark.parametrize("held", [True, False])  # in a buffer until the end, or written at once
def test_a_reader_who_left_ends_a_command_in_silence(held, monkeypatch, capsys):
    """Fault: `| head -1` ends in a traceback, of the command or of the interpreter's teardown."""

    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(os, "_exit", sys.exit)
    raw = os.fdopen(writer, "wb", buffering=0)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), write_through=not held))
    with pytest.raises(SystemExit) as caught:
        errors.run(lambda: print("text", flush=not held))
    monkeypatch.undo()
    assert (caught.value.code, capsys.readouterr().err) == (141, "")


def test_another_broken_pipe_is_an_error(monkeypatch):
    """Fault: a socket or a child that went away ends the command as if somebody had stopped reading it."""

    def main():
        raise BrokenPipeError

    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(BrokenPipeError):
        errors.run(main)


def test_what_is_told_has_no_secrets(capsys):
    errors.print_error(
        errors.UnreachableError("https://key:hunter2@s3.example/x?X-Amz-Signature=hunter2 does not answer")
    )
    assert capsys.readouterr().err == "UnreachableError: https://s3.example/x does not answer\n"


def test_exit_codes_are_distinct():
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.WarmDistError)
    ]
    codes = [
        kind.exit_code for kind in kinds if kind is not errors.PeerError and errors.WarmDistError in kind.__bases__
    ]
    assert len(set(codes)) == len(codes) >= 11


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("see https://u:p@ss@host/x", "see https://host/x"),
        ("http://u:p/w@h", "http://h"),
        ("http://u:/p?w#@h:1/x", "http://h:1/x"),
        ("http://u:12/p@h", "http://h"),
        ("http://u.v:12/p@h.example:1/x", "http://h.example:1/x"),
        ("http://u.v:80#p@h and http://u:123456/p@h", "http://h and http://h"),
        ("http://me@corp.example:p@h", "http://h"),
        ("http://u:p://w@h", "http://h"),
        ("http://u%3Ap%40w%2F@h", "http://h"),
        ("http://token@h/x, http://:p@h/y", "http://h/x, http://h/y"),
        ("http://u:p@h,https://v:q@i/z", "http://h,https://i/z"),
        ("HTTP://u:p@h and mlflow+http://u:123@h/", "HTTP://h and mlflow+http://h/"),
        ("http://h/x?X-Amz-Credential=a&X-Amz-Signature=b is away", "http://h/x is away"),
        ("s3://key:se/cret@bucket/x", "s3://bucket/x"),
        ("s3://bucket/x?versionId=1&X-Amz-Signature=b", "s3://bucket/x?versionId=1"),
        ("/bucket/x?AWSAccessKeyId=a&Signature=b", "/bucket/x"),
        ("http://h/x#access_token=a", "http://h/x"),
    ],
)
def test_secrets_in_urls_are_not_told(text, told):
    assert redact(text) == told


@pytest.mark.parametrize("user", ["u", "me@corp.example", "u.v", ""])
@pytest.mark.parametrize(
    "quoted", [str, json.dumps, repr, lambda text: str([text, "a b"])], ids=["plain", "JSON", "repr", "list"]
)
def test_no_password_is_told_whatever_it_holds(user, quoted):
    """Fault: one of ASCII's signs, or a number before it, is taken for the end of the password."""
    signs = [*map("".join, itertools.product(string.punctuation, repeat=2)), "://", "@@/", ""]
    passwords = [f"{start}hun{sign}ter2" for start in ("", "/", "12", "12/", "123456/") for sign in signs]
    for password in passwords:
        told = redact(quoted(f"no answer from http://{user}:{password}@host:9000/path?query=1, twice"))
        assert "hun" not in told, password
        assert "ter2" not in told, password


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/set#1/d8/manifest.parquet: does not exist",
        "s3://bucket/a@b/who?#.tar",
        "file:///set#1/a?b@c",
        "http://127.0.0.1:8333/bucket/a@b",
        "http://s3.example:9000/bucket/icon@2x.png, http://localhost:9000/a@b",
        "http://[::1]:8333/bucket/a@b",
        "http://h: 5 @ 3? yes #1, a@b.c",
        "C:\\set#1 50 % p:q@h",
    ],
)
def test_what_is_no_secret_stays(text):
    """Fault: a manifest's key is cut at `#`, in errors and in the config of exported weights."""
    assert redact(text) == text


@pytest.mark.parametrize("say", [errors.print_line, errors.tell])
def test_names_of_people_do_not_steer_a_terminal(say, capsys):
    say("a\x1b[2J\u202eb\udc80\r\u2028c\x9b\t\nd é\u3000猫🐈")
    assert "".join(capsys.readouterr()) == "a\\x1b[2J\\u202eb\\udc80\\r\\u2028c\\x9b\\t\nd é\u3000猫🐈\n"


def test_everything_printed_goes_through_these_two():
    """Fault: a command prints a folder's name as it is, with the sequences in it that clear the reader's terminal."""
    ours = [*(ROOT / "warm_dist").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
    raw = {"warm_dist/errors.py", "warm_dist/supervisor.py", "warm_dist/config/__main__.py"}  # the two; no names
    for path in ours:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        told = [call.args for call in prints if not all(isinstance(word, ast.Constant) for word in call.args)]
        assert not told or str(path.relative_to(ROOT)) in raw, f"{path}: prints {told}; use tell or print_line"


def test_secrets_are_taken_out_of_trees() -> None:
    tree = {"a": ["http://u:p@h:1/x?sig=1#f", 3, None], "b": "see https://h/x?k=1 and s3://b/k, 5 @ 3? yes #1"}
    assert redact(tree) == {"a": ["http://h:1/x", 3, None], "b": "see https://h/x and s3://b/k, 5 @ 3? yes #1"}


def test_nothing_that_a_terminal_obeys_is_printed(capsys) -> None:
    """Fault: a file's name clears the screen, breaks the line or turns the writing, or cannot be encoded at all."""
    errors.print_error(errors.DataError("a\x1b[2Jb\u202ec\udcffd\u2028e\x85é 日 😀\n  more\r"))
    line, more = capsys.readouterr().err.splitlines()
    assert line == r"DataError: a\x1b[2Jb\u202ec\udcffd\u2028e\x85é 日 😀"
    assert more == r"  more\r"


def test_what_all_ranks_say_is_said_by_the_first(monkeypatch, capsys) -> None:
    """Fault: a line about the data comes once from every rank; or what one rank alone has seen is not told."""
    monkeypatch.setattr(errors, "_mute", True)
    errors.print_once("of all", shared=True)
    errors.print_once("of this one")
    errors.leave_the_word(False)
    for _ in range(2):
        errors.print_once("of all", shared=True)
    assert capsys.readouterr().err == "of this one\nof all\n"


def test_reasons_have_no_addresses_and_are_never_empty() -> None:
    assert errors.reason(ValueError("cannot identify\n <_io.BytesIO object at 0x7f21aa>")) == "cannot identify the data"
    assert errors.reason(MemoryError()) == "MemoryError"
    assert [errors.count(number, "shard") for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]


@pytest.fixture
def as_before(monkeypatch):
    """What a command changes of its process is put back."""
    for name in ("no_proxy", "NO_PROXY", "PYTHONIOENCODING"):
        monkeypatch.setenv(name, "")  # so that it is noted, and put back at the end
        monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *supervisor.REQUESTS)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_what_a_terminal_cannot_show_is_escaped_and_ends_nothing(monkeypatch, as_before):
    """Fault: `Fréchet` ends a run whose output goes to an ASCII terminal, here or in a process that it starts."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    with pytest.raises(SystemExit) as caught:
        errors.run(lambda: print("Fréchet 日"))
    assert (caught.value.code, out.getvalue()) == (0, b"Fr\\xe9chet \\u65e5\n")
    assert os.environ["PYTHONIOENCODING"] == ":backslashreplace"
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1:strict")
    errors.adapt()
    assert os.environ["PYTHONIOENCODING"] == "latin-1:backslashreplace"


def test_servers_of_this_machine_are_reached_without_a_proxy(monkeypatch, as_before):
    """Fault: a company's proxy is asked for 127.0.0.1, which is itself."""
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "intranet.example,localhost")
    errors.adapt()
    errors.adapt()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intranet.example,localhost,127.0.0.1,::1"
    assert [bool(proxy_bypass(host)) for host in ("127.0.0.1:80", "localhost", "s3.example")] == [True, True, False]
    monkeypatch.setenv("no_proxy", "*")  # a list with it would mean something else
    errors.adapt()
    assert os.environ["no_proxy"] == "*"


SWALLOWS = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
"""


def test_ctrl_c_ends_a_command_while_it_imports(monkeypatch, tmp_path, as_before):
    """Fault: a library that is being imported swallows it, and the command goes on; or Python prints a traceback."""
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-m"])
    codes: list[int] = []

    def leave(code):
        codes.append(code)
        raise SystemExit(code)  # where _exit would not return

    monkeypatch.setattr(os, "_exit", leave)
    warm_dist.guard_start()

    def main():
        sys.modules.pop("swallows", None)
        importlib.import_module("swallows")
        assert codes == left
        if left:  # the real _exit does not return
            raise KeyboardInterrupt
        time.sleep(10)  # the import is over, and what has begun meanwhile ends in order

    for left in ([], [130]):
        with pytest.raises(SystemExit) as caught:
            errors.run(main)
        assert (caught.value.code, codes) == (130, left)
        monkeypatch.setattr(warm_dist, "_PATIENCE_S", -1.0)  # an import that takes too long
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)
    assert codes == [130, 130]  # before `run`, between two imports


def test_only_our_commands_end_so(monkeypatch, as_before):
    before = signal.getsignal(signal.SIGINT)
    for program, guarded in (("/usr/bin/pytest", False), ("", False), (str(ROOT / "launch" / "train.py"), True)):
        monkeypatch.setattr(sys, "argv", [program])
        warm_dist.guard_start()
        assert (signal.getsignal(signal.SIGINT) is not before) == guarded, program


@pytest.mark.parametrize("number", supervisor.REQUESTS)
def test_a_request_to_stop_before_anything_has_begun(number, monkeypatch, capfd, as_before):
    """Fault: SLURM's signal in the first two seconds ends a run as killed, which its scheduler takes as final."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "launch" / "ui.py")])
    warm_dist.guard_start()
    assert signal.getsignal(number) == signal.SIG_DFL  # nothing to go on with
    monkeypatch.setattr(sys, "argv", [str(ROOT / "launch" / "train.py")])
    monkeypatch.setenv("LOCAL_RANK", "1")
    warm_dist.guard_start()
    signal.raise_signal(number)
    monkeypatch.setenv("LOCAL_RANK", "0")
    signal.raise_signal(number)
    assert codes == [75, 75]
    told = f"Stopped: {number.name} before anything had begun; run the same command again\n"
    assert capfd.readouterr().err == told  # of one rank
    signal.signal(number, signal.SIG_IGN)
    warm_dist.guard_start()
    assert signal.getsignal(number) == signal.SIG_IGN  # as under nohup


def test_a_disk_that_is_full_where_a_command_prints(monkeypatch, capsys):
    """Fault: the data set is packed, and a traceback says that the program is broken."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def main(name=None):
        raise OSError(errno.ENOSPC, "No space left on device", name)

    with pytest.raises(OSError, match="No space"):  # _exit returns here
        errors.run(main)
    assert codes == [8]
    assert "what this command prints cannot be written (No space left on device)" in capsys.readouterr().err
    with pytest.raises(OSError, match=r"x\.bin"):
        errors.run(lambda: main("x.bin"))
    assert codes == [8]


def test_a_stream_that_is_closed_is_no_fault(monkeypatch):
    """Fault: `train.py >&-` trains to the end, and then a traceback ends it with 1."""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as caught:
        errors.run(lambda: print("finished"))
    assert caught.value.code == 0
    sys.stdout.close()


def test_numbers_of_closed_streams_are_taken_at_once(monkeypatch, as_before):
    """Fault: stdout is closed, the next file gets its number, and what a library prints goes into that file."""
    opened, inherited = iter([1, 7]), []
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(os, "open", lambda *_: next(opened))
    monkeypatch.setattr(os, "close", lambda number: inherited.append(-number))
    monkeypatch.setattr(os, "set_inheritable", lambda number, _: inherited.append(number))
    warm_dist.guard_start()
    assert inherited == [1, -7]
