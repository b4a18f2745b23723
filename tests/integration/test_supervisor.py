"""Real processes, real kills: nothing outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from warm_dist import supervisor


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# a command with a child in its group and a child in a session of its own; each writes its pid
FAMILY = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
child = "import os, sys, time, pathlib; {}; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
subprocess.Popen([sys.executable, "-c", child.format("pass"), str(folder / "same-group")])
subprocess.Popen([sys.executable, "-c", child.format(stubborn), str(folder / "own-session")], start_new_session=True)
(folder / "command").write_text(str(os.getpid()))
time.sleep(600)
"""
OWNER = """
import sys, time
from pathlib import Path
from warm_dist import supervisor
process = supervisor.start([sys.executable, "-c", sys.argv[1], sys.argv[2]])
(Path(sys.argv[2]) / "supervisor").write_text(str(process.pid))
time.sleep(600)
"""
MEMBERS = ("command", "same-group", "own-session")


def family(folder: Path) -> dict[str, str]:
    """Identities by name, once all have written their pids."""
    assert wait_until(lambda: all((folder / name).exists() and (folder / name).read_text() for name in MEMBERS))
    return {name: supervisor.identity(int((folder / name).read_text())) for name in MEMBERS}


def test_kill_9_of_the_owner_ends_the_command_and_its_grandchildren(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, FAMILY, str(tmp_path)])
    try:
        members = family(tmp_path)
        assert all(supervisor.alive(member) for member in members.values())
    finally:
        owner.kill()
        owner.wait()
    assert wait_until(lambda: not any(supervisor.alive(member) for member in members.values())), members


def test_kill_9_of_the_supervisor_ends_the_command(tmp_path: Path) -> None:
    process = supervisor.start([sys.executable, "-c", FAMILY, str(tmp_path)])
    members = family(tmp_path)
    process.kill()
    process.wait()
    try:
        assert wait_until(lambda: not supervisor.alive(members["command"]))
    finally:  # a documented limit: the command's own children are nobody's then
        for name in ("same-group", "own-session"):
            os.kill(int((tmp_path / name).read_text()), signal.SIGKILL)


def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(600)"
    process = supervisor.start([sys.executable, "-c", code])
    assert wait_until(ready.exists)
    assert supervisor.stop(process, timeout_s=0.3) == 128 + signal.SIGKILL


def test_exit_code_output_and_environment_pass_through(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import os, sys; print(os.environ['COLOUR']); sys.exit(7)"
    process = supervisor.start([sys.executable, "-c", code], env={**os.environ, "COLOUR": "blue"}, log=log)
    assert process.wait(20) == 7
    assert log.read_text() == "blue\n"
    assert supervisor.stop(process) == 7  # stopping what has ended is harmless


def test_sigterm_is_forwarded_and_the_command_may_end_as_it_likes(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75));"
        f"open({str(ready)!r}, 'w'); time.sleep(600)"
    )
    process = supervisor.start([sys.executable, "-c", code])
    assert wait_until(ready.exists)
    assert supervisor.stop(process) == 75


def test_a_supervisor_that_was_stopped_for_a_while_goes_on(tmp_path: Path) -> None:
    """As by Ctrl-Z or a laptop's sleep: Python's sigtimedwait then returns what is no signal, here also on purpose."""
    code = f"""
import signal, sys, types
from pathlib import Path
from warm_dist import supervisor
wait, count = signal.sigtimedwait, iter(range(10**9))
def odd(signals, timeout):
    received = wait(signals, timeout)
    return types.SimpleNamespace(si_signo=(-7, 0, 21845)[next(count) % 3]) if received is None else received
signal.sigtimedwait = odd
sys.argv[1:] = ["--", sys.executable, "-c", "import time; open({str(tmp_path / "ready")!r}, 'w'); time.sleep(3); raise SystemExit(5)"]
sys.exit(supervisor.main())
"""
    environment = {**os.environ, supervisor.OWNER: supervisor.identity(os.getpid())}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    assert wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2 * supervisor.WATCH_S)  # past the timeout: this is what is tested
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 5, "the command's own code: it was not ended"


def test_a_command_that_does_not_exist_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert supervisor.start(["no-such-command-here"], log=log).wait(20) == 127
    assert "no-such-command-here: cannot be run" in log.read_text()


def test_a_reused_pid_does_not_pass_for_the_owner() -> None:
    pid, start = supervisor.identity(os.getpid()).split(":")
    assert supervisor.alive(f"{pid}:{start}")
    assert not supervisor.alive(f"{pid}:{int(start) + 1}")
    command = [sys.executable, "-m", "warm_dist.supervisor", "--", sys.executable, "-c", "raise SystemExit(9)"]
    assert subprocess.run(command, env={**os.environ, supervisor.OWNER: f"{pid}:{int(start) + 1}"}).returncode == 1


def test_a_zombie_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    who = f"{process.pid}:"
    assert wait_until(lambda: not supervisor.identity(process.pid))
    process.wait()
    assert not supervisor.alive(who)


RUN = """
import sys
from warm_dist import supervisor
child = "import pathlib, sys, time\\\\ntry:\\\\n    pathlib.Path(sys.argv[1]).touch(); time.sleep(600)\\\\nexcept KeyboardInterrupt:\\\\n    sys.exit(7)"
sys.exit(supervisor.run([sys.executable, "-c", child.replace("\\\\n", chr(10)), sys.argv[1]]))
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_what_is_run_as_ctrl_c_and_its_code_comes_back(tmp_path: Path, signum: signal.Signals) -> None:
    ready = tmp_path / "ready"
    owner = subprocess.Popen([sys.executable, "-c", RUN, str(ready)])
    try:
        assert wait_until(ready.exists)
        owner.send_signal(signum)
        assert owner.wait(20) == 7
    finally:
        owner.kill()


def test_the_code_of_what_is_run_comes_back_and_all_that_it_left_is_ended(tmp_path: Path) -> None:
    mark = tmp_path / "left"
    left = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {left!r}], start_new_session=True); sys.stdin.read(); import pathlib, time\nwhile not (pathlib.Path({str(mark)!r}).exists() and pathlib.Path({str(mark)!r}).read_text()): time.sleep(0.02)\nsys.exit(5)"
    script = f"import sys; from warm_dist import supervisor; sys.exit(supervisor.run([sys.executable, '-c', {code!r}]))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 5
    assert supervisor.identity(int(mark.read_text())) == ""
