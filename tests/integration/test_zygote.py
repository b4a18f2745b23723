"""Forks of the zygote are what a python of their own would be; else every test that is made of them proves less."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT, wait_for
from tests.support.zygote import Zygote
from warm_dist import supervisor

TELL = """
import json, os, sys
print(json.dumps([sys.argv, os.environ["WHO"], os.getcwd(), os.getsid(0) == os.getpid(), __name__]))
"""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    one = Zygote(imports=())
    yield one
    one.end()


def test_a_fork_has_arguments_environment_folder_and_session_of_its_own(zygote: Zygote, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TELL)
    for words, argv in ((["-c", TELL, "a"], ["-c", "a"]), ([str(script), "a"], [str(script), "a"])):
        fork = zygote.start(*words, env={**os.environ, "WHO": "me"}, cwd=tmp_path)
        out, err = fork.communicate(60)
        assert (fork.returncode, err) == (0, "")
        assert json.loads(out) == [argv, "me", str(tmp_path), True, "__main__"]
    assert "WHO" not in os.environ


def test_a_fork_ends_with_its_code_its_traceback_or_its_signal(zygote: Zygote) -> None:
    assert zygote.run("-c", "import sys; sys.exit(7)").returncode == 7
    failed = zygote.run("-c", "print('said', end=''); 1 / 0")
    assert (failed.returncode, failed.stdout) == (1, "said")
    assert failed.stderr.endswith("ZeroDivisionError: division by zero\n")
    killed = zygote.start("-c", "import time; time.sleep(600)")
    assert killed.poll() is None
    killed.kill()
    assert (killed.wait(60), killed.poll()) == (-signal.SIGKILL, -signal.SIGKILL)
    assert zygote.run("-m", "warm_dist.supervisor").returncode == 2  # its usage


OWNER = """
import os, time
from tests.support.zygote import Zygote
from warm_dist import supervisor
one = Zygote(imports=())
print(supervisor.identity(one.start("-c", "import time; time.sleep(600)").pid), flush=True)
if os.fork() == 0:
    time.sleep(600)  # a fork of the owner's own has what the owner had open
print(flush=True)
time.sleep(600)
"""


def test_no_fork_outlives_a_killed_owner_though_the_owners_own_fork_does() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert owner.stdout is not None
        who = owner.stdout.readline().strip()
        owner.stdout.readline()
        assert supervisor.alive(who)
        owner.kill()
        wait_for("the fork's end", lambda: not supervisor.alive(who), 60)
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.communicate()


def test_no_fork_outlives_the_zygote_nor_that_its_owner() -> None:
    one = Zygote(imports=())
    who = supervisor.identity(one.start("-c", "import time; time.sleep(600)").pid)
    assert supervisor.alive(who)
    one.end()
    wait_for("the fork's end", lambda: not supervisor.alive(who), 60)
