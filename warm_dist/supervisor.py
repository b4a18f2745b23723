"""Child processes that cannot outlive their owner: `python -m warm_dist.supervisor -- CMD...` (Linux).

The owner's pid and start time are passed in the environment. The supervisor runs CMD in its own process group and ends
it, with everything that CMD started, as soon as the owner is gone, even by kill -9. PR_SET_PDEATHSIG alone is not
enough: it fires when the *thread* that started the child ends, and grandchildren do not inherit it.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

OWNER = "WARM_DIST_OWNER"  # "pid:start time in clock ticks since boot"
WATCH_S = 0.2  # interval of looking for the owner
GRACE_S = 5.0  # between SIGTERM and SIGKILL once the owner is gone
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
# a request to stop: of launchers, a terminal that closes, SLURM's --signal, and a limit of CPU time
REQUESTS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
_SIGNALS = {signal.SIGCHLD, signal.SIGINT, signal.SIGQUIT, *REQUESTS}


def start(
    command: list[str],
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    cwd: str | None = None,
    umask: int = -1,
) -> subprocess.Popen[bytes]:
    """Start `command` under a supervisor that ends it when this process ends.

    env: the whole environment. log: a file to which stdout and stderr are appended. cwd: working folder. umask: of the
    files that it creates. None, -1: ours.
    Returns the supervisor's process: its exit code is the command's (128 + n after signal n, 127 if it cannot be run),
    and SIGINT or one of REQUESTS sent to it reaches the command's whole group. End it with `stop`.
    """
    environment = {**(os.environ if env is None else env), OWNER: identity(os.getpid())}
    with log.open("ab") if log else contextlib.nullcontext() as out:
        return subprocess.Popen(
            [sys.executable, "-m", "warm_dist.supervisor", "--", *command],
            env=environment,
            cwd=cwd,
            umask=umask,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out else None,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes], timeout_s: float = 10) -> int:
    """End a process from `start` and all that it started: SIGTERM, SIGKILL after `timeout_s`. Returns the exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)  # makes the supervisor send SIGKILL to all
    return process.wait(2 * GRACE_S)


def run(command: list[str]) -> int:
    """Run `command` under a supervisor until it ends; Ctrl-C and REQUESTS reach it as SIGINT. Returns its exit code.

    Nothing that it started outlives it or this process.
    """
    forwarded = {signal.SIGINT, *REQUESTS}
    signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)  # until the process exists
    process = start(command)
    on_request(lambda *_: process.send_signal(signal.SIGINT), signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
    try:
        return process.wait()
    finally:
        stop(process)


def on_request(handler: Callable[[int, FrameType | None], object], *others: int) -> None:
    """Handle REQUESTS and these other signals (main thread only). A SIGHUP that is ignored, as by nohup, stays ignored."""
    for signum in (*REQUESTS, *others):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def end_with_parent(signum: int) -> None:
    """Ask the kernel to send this process `signum` when its parent ends (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)


def end_with_launcher() -> None:
    """Have the kernel end a launcher's rank with the launcher; a rank whose launcher has just ended ends too (Linux)."""
    if "LOCAL_RANK" in os.environ:
        launcher = os.getppid()
        end_with_parent(signal.SIGTERM)
        if os.getppid() != launcher:
            os._exit(128 + signal.SIGTERM)


def identity(pid: int) -> str:
    """`pid:start time`, unique even if the pid is reused; empty if there is no such process or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat[stat.rindex(")") + 2 :].split()  # the name, in parentheses, may hold anything; state follows it
    return "" if fields[0] in "ZX" else f"{pid}:{fields[19]}"


def alive(who: str) -> bool:
    """Whether the process with this `identity` still exists."""
    return bool(who) and identity(int(who.partition(":")[0])) == who


def become_subreaper() -> None:
    """Ask the kernel to make orphaned descendants of this process its children (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def free_port(address: str = "127.0.0.1", port: int = 0) -> int:
    """Find a TCP port of this address that is not in use, or check that `port` is one: else OSError or OverflowError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(port > 0))  # ignore a closed server's TIME_WAIT
        probe.bind((address, port))
        return int(probe.getsockname()[1])


def _supervise(command: list[str], owner: str) -> int:
    # all that CMD leaves behind becomes our child, even outside its group: no children means nothing is left
    become_subreaper()
    # signals are blocked and fetched one by one, so that none is lost, not even between fork and exec
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        end_with_parent(signal.SIGKILL)  # if the supervisor is killed
        if os.getppid() != supervisor:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"{command[0]}: cannot be run ({error.strerror})", file=sys.stderr, flush=True)
            os._exit(127)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # in both processes, so that the group exists before a signal is sent to it
    family = _Family(child)
    while family.reap() and family.code is None:
        received = signal.sigtimedwait(_SIGNALS, WATCH_S)
        # after a sleep past the timeout (SIGSTOP, suspend) sigtimedwait returns garbage instead of None
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
    """CMD and all its descendants."""

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self.code: int | None = None

    def reap(self) -> bool:
        """Collect ended processes and CMD's exit code; True while any is left."""
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
        """Send SIGTERM to the group, SIGKILL to all after `grace_s`; give up on those that survive that."""
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
    return _supervise(sys.argv[2:], owner) if alive(owner) else 1


if __name__ == "__main__":
    sys.exit(main())
