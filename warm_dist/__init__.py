"""Distributed training of blur-noise mixture diffusion models (Warm Diffusion, arXiv 2511.16904).

It is the first that a command reads, and sees to it that Ctrl-C ends the command from here on.
"""

import os
import signal
import sys
import time
from types import FrameType

__version__ = "0.1.0"
_COMMANDS = tuple(
    f"{os.path.dirname(os.path.dirname(__file__))}/{package}/" for package in ("launch", "data_pipelines")
)

_LONG = ("train.py", "evaluate.py", "node.py")
"""Commands that a scheduler stops and starts again as they are, and that take requests to stop once they have begun."""
_PATIENCE_S, _RETRY_S = 1.0, 0.05  # for an import to end, after which what the command has started is ended in order
_asked = 0.0


def guard_start() -> None:
    """Have Ctrl-C end a command of ours at once while it reads its modules; other programs are left alone.

    So does a request to stop, in those that may be started again, until they take it themselves, with the code for that.
    Some libraries catch the KeyboardInterrupt that meets them there, and Python prints a traceback of the others.
    Standard streams that are closed are /dev/null from here on, lest a file takes their number and gets what is printed.
    """
    program = sys.argv[0] if sys.argv else ""  # "-m" while `python -m` looks for the module
    if program == "-m" or os.path.realpath(program).startswith(_COMMANDS):
        signal.signal(signal.SIGINT, _interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU):
            if os.path.basename(program) in _LONG and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _stop)
        while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The end, at once, until `errors.run` has begun; then as signal.default_int_handler, as soon as no import runs."""
    global _asked
    begun = importing = False
    while frame is not None:
        importing |= frame.f_code.co_filename.startswith("<frozen importlib")
        begun |= frame.f_code.co_name == "run" and frame.f_globals.get("__name__") == "warm_dist.errors"
        frame = frame.f_back
    if not begun:
        os._exit(130)
    if not importing:
        raise KeyboardInterrupt
    _asked = _asked or time.monotonic()
    if time.monotonic() > _asked + _PATIENCE_S:
        os._exit(130)
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, _RETRY_S)


def _stop(number: int, frame: FrameType | None) -> None:
    if os.environ.get("LOCAL_RANK", "").strip() in ("", "0"):
        name = signal.Signals(number).name
        os.write(2, f"Stopped: {name} before anything had begun; run the same command again\n".encode())
    os._exit(75)


guard_start()
