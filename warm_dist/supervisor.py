"""Child processes that cannot outlive their owner: a tiny supervisor, `python -m warm_dist.supervisor -- CMD...` (Linux).

The owner's pid and start time travel in the environment. The supervisor runs CMD in a process group of its own and
ends it, with everything that CMD started, as soon as the owner is gone, whatever ended the owner (kill -9 included).
PR_SET_PDEATHSIG alone would not do: it fires when the *thread* that started the child ends, and grandchildren lack it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

OWNER = "WARM_DIST_OWNER"  # "pid:start time in clock ticks since boot"
WATCH_S = 0.2  # how soon the end of the owner is noticed
GRACE_S = 5.0  # between SIGTERM and SIGKILL once the owner is gone
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}


def start(
    command: list[str], env: Mapping[str, str] | None = None, log: Path | None = None, cwd: str | None = None
) -> subprocess.Popen[bytes]:
    """Start `command` under a supervisor that ends it when this process ends.

    env: the whole environment (None: ours). log: a file that stdout and stderr are appended to (None: ours). cwd: its
    working folder (None: ours).
    Returns the supervisor's process: its exit code is the command's (128 + n after signal n, 127 if it cannot be run),
    and SIGTERM or SIGINT sent to it reach the command's whole group. End it with `stop`.
    """
    environment = {**(os.environ if env is None else env), OWNER: identity(os.getpid())}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(log.open("ab")) if log else None
        return subprocess.Popen(
            [sys.executable, "-m", "warm_dist.supervisor", "--", *command],
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out else None,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes], timeout_s: float = 10) -> int:
    """End a process that `start` returned: SIGTERM, after `timeout_s` SIGKILL, to all that it started. Returns its code."""
    if process.poll() is None:
        process.terminate()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)  # the supervisor's word for SIGKILL to everybody
    return process.wait(2 * GRACE_S)


def run(command: list[str]) -> int:
    """Run `command` as `start` does, to its end; Ctrl-C and SIGTERM reach it as SIGINT. Returns its exit code.

    So nothing that it started outlives it, or this process, whichever is killed.
    """
    told = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, told)  # until there is somebody to pass them to
    process = start(command)
    for signum in told:
        signal.signal(signum, lambda *_: process.send_signal(signal.SIGINT))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, told)
    try:
        return process.wait()
    finally:
        stop(process)


def end_with_parent(signum: int) -> None:
    """Have the kernel send this process `signum` when its parent is gone (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)


def identity(pid: int) -> str:
    """`pid:start time`, which no later process with the same pid has; empty when there is no such process, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat[stat.rindex(")") + 2 :].split()  # the name, in parentheses, may hold anything; state follows it
    return "" if fields[0] in "ZX" else f"{pid}:{fields[19]}"


def alive(who: str) -> bool:
    """Is the process that `identity` named still there?"""
    return bool(who) and identity(int(who.partition(":")[0])) == who


def become_subreaper() -> None:
    """Have the kernel make orphans among this process's descendants its own children (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port of this address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _supervise(command: list[str], owner: str) -> int:
    # whatever CMD leaves behind becomes our child, also what left its group: "no children" then means "nothing left"
    become_subreaper()
    # signals are blocked and fetched one by one, so none is lost between two lines, nor between fork and exec
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        end_with_parent(signal.SIGKILL)  # for a kill -9 of the supervisor
        if os.getppid() != supervisor:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"{command[0]}: cannot be run ({error.strerror})", file=sys.stderr, flush=True)
            os._exit(127)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # here too: whoever comes first, the group exists before a signal is sent to it
    family = _Family(child)
    while family.reap() and family.code is None:
        received = signal.sigtimedwait(_SIGNALS, WATCH_S)
        # a process that slept past the timeout (SIGSTOP, a laptop's lid) gets, instead of None, whatever the memory held
        signum = received.si_signo if received is not None else 0
        if signum not in _SIGNALS:
            if not alive(owner):
                break
        elif signum == signal.SIGQUIT:
            family.end(0)
        elif signum != signal.SIGCHLD:
            family.send(signum)
    family.end(GRACE_S)
    code = 1 if family.code is None else family.code
    return code if code >= 0 else 128 - code


class _Family:
    """CMD and all that descends from it."""

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self.code: int | None = None

    def reap(self) -> bool:
        """Collect the dead, remember CMD's exit code; True while somebody lives."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.leader:
                self.code = os.waitstatus_to_exitcode(status)

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.leader, signum)

    def end(self, grace_s: float) -> None:
        """SIGTERM to the group, after `grace_s` SIGKILL to the group and to those that left it; gives up at the undying."""
        import psutil

        self.send(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self.reap():
            if time.monotonic() > deadline + GRACE_S:
                return
            if time.monotonic() >= deadline:
                self.send(signal.SIGKILL)
                for child in psutil.Process().children():
                    with contextlib.suppress(psutil.Error):
                        child.kill()
            signal.sigtimedwait({signal.SIGCHLD}, 0.05)


def main() -> int:
    """The supervisor's command line."""
    owner = os.environ.get(OWNER, "")
    if len(sys.argv) < 3 or sys.argv[1] != "--" or not owner:
        print(f"usage: {OWNER}=PID:START python -m warm_dist.supervisor -- CMD...", file=sys.stderr)
        return 2
    if not alive(owner):
        return 1
    return _supervise(sys.argv[2:], owner)


if __name__ == "__main__":
    sys.exit(main())
