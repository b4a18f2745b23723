import pickle
import subprocess
import sys

from tests.processes import ROOT
from warm_dist import errors


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


def test_what_is_told_has_no_secrets(capsys):
    errors.print_error(
        errors.UnreachableError("https://key:hunter2@s3.example/x?X-Amz-Signature=hunter2 does not answer")
    )
    assert capsys.readouterr().err == "UnreachableError: https://s3.example/x does not answer\n"
