"""Real processes that start in a tenth of a second: forks of one that has imported everything.

Importing torch and deepspeed takes seconds, a run of a few steps much less. So one process of a test session, the zygote,
imports them; its forks get their own session, environment, working folder and output, and then run a script as
`python SCRIPT ARGUMENTS…` would. Two things need a real start: that a command imports what it needs, and a mark in
/proc/PID/environ, where a fork shows the zygote's.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from tests.support.paths import ROOT
from warm_dist import supervisor

IMPORTS = (
    "torch._dynamo",  # torch's optimizers
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.original_muon",  # stages 1 and 2
    "boto3.s3.transfer",
    "pyarrow.parquet",
    "matplotlib.figure",
    "cleanfid.features",
    "warm_dist.training.deepspeed_engine",
    "warm_dist.evaluation.evaluator",
    "warm_dist.training.trainer",
    "launch.train",
)
MESSAGE_BYTES = 1 << 18


class Forked:
    """A process of the zygote's, with subprocess.Popen's methods; the first of a session of its own."""

    def __init__(
        self, zygote: Zygote, args: Sequence[str], env: Mapping[str, str], cwd: Path, stdout: int | None
    ) -> None:
        self.args, self.returncode, self._zygote = list(args), None, zygote
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  # closed by communicate
        request = {"args": self.args, "env": dict(env), "cwd": str(cwd)}
        out, err = (file.fileno() for file in self._files)
        self.pid = zygote.ask(request, [out if stdout is None else stdout, err])
        self._pidfd = os.pidfd_open(self.pid)
        self.returncode: int | None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(self._zygote.ask({"ended": self.pid}))
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it said on stdout and on stderr, at its end."""
        self.wait(timeout)
        said = []
        for file in self._files:
            file.seek(0)
            said.append(file.read())
            file.close()
        os.close(self._pidfd)
        return said[0], said[1]

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """The process that has imported everything, and our end of the line to it. It ends, with all its forks, when we do."""

    def __init__(self, imports: Sequence[str] = IMPORTS) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", __spec__.name, str(theirs.fileno()), *imports]
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        os.register_at_fork(after_in_child=self._line.close)  # else a fork of ours that outlives us keeps it open
        self._turn = threading.Lock()  # tests wait in threads, too
        atexit.register(self.end)

    def start(
        self, *args: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT, stdout: int | None = None
    ) -> Forked:
        """`python ARGS…`: a script's path, `-m` and a module, or `-c` and code; then its arguments.

        env: the whole environment (None: ours). stdout: a descriptor, for a pipe that is read meanwhile.
        """
        return Forked(self, args, os.environ if env is None else env, cwd, stdout)

    def run(
        self, *args: object, env: Mapping[str, str] | None = None, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """The same to its end."""
        process = self.start(*map(str, args), env=env)
        try:
            said = process.communicate(timeout_s)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.wait(), *said)

    def end(self) -> None:
        """It ends when nobody is at our end of the line; so it does also when we are killed."""
        self._line.close()
        self._process.wait()

    def ask(self, request: dict[str, Any], files: Sequence[int] = ()) -> int:
        with self._turn:
            socket.send_fds(self._line, [json.dumps(request).encode()], files)
            answer = self._line.recv(MESSAGE_BYTES)
        assert answer, "the zygote has ended"
        return int(answer)


@cache
def zygote() -> Zygote:
    """The one of this test process, started when first asked for."""
    return Zygote()


def _serve(line: socket.socket) -> dict[str, Any]:
    """The zygote's life; returns, in each fork, what that is to be."""
    mine, living = os.getpid(), set[int]()
    while True:
        data, files, _, _ = socket.recv_fds(line, MESSAGE_BYTES, 2)
        if not data:
            _end(living)
        request: dict[str, Any] = json.loads(data)
        if "ended" in request:
            living.discard(request["ended"])
            answer = os.waitpid(request["ended"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                line.close()
                _become(request, files, mine)
                return request
            living.add(answer)
            for file in files:
                os.close(file)
        line.send(str(answer).encode())


def _end(living: set[int]) -> NoReturn:
    for pid in living:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)


def _become(request: dict[str, Any], files: list[int], parent: int) -> None:
    """What exec would do to a fork: a session, an environment, a folder, standard files and arguments of its own."""
    os.setsid()
    supervisor.end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None  # of our TMPDIR
    first, *rest = request["args"]
    sys.argv = {"-m": rest, "-c": [first, *rest[1:]]}.get(first, request["args"])  # as python has it
    if not first.startswith("-"):
        sys.path.insert(0, str(Path(first).parent))


def main() -> None:
    line = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        __import__(name)
    gc.freeze()  # what is shared stays shared: a collection would write to every page
    first, *rest = _serve(line)["args"]
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(rest[0], {"__name__": "__main__"})
    else:
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
