"""The exit code of a process whose end goes wrong."""

from __future__ import annotations

import subprocess
import sys

from tests.support.processes import ROOT


def test_an_errors_exit_code_survives_a_teardown_that_aborts():
    # as a native thread may do in the interpreter's teardown; what was printed before is not lost
    code = """
import atexit, os
from warm_dist import errors

def main():
    atexit.register(os.abort)
    print("before")
    raise errors.ConfigError("no such key")

errors.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "before\n", "ConfigError: no such key\n")
