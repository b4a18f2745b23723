"""The commands of the README, docs/ and k8s/README.md: targets, scripts and options exist as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from string import Template

import pytest

from tests.support.paths import ROOT
from warm_dist.config.run import load_config

README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "k8s" / "README.md"])]


def commands(page: str) -> Iterator[str]:
    """The lines of the page's sh blocks; in a loop, with the first value of its variables."""
    first: dict[str, str] = {}
    for line in "\n".join(re.findall(r"```sh\n(.*?)```", page, re.S)).replace("\\\n", " ").splitlines():
        loops = dict(re.findall(r"for (\w+) in (\S+)", line))
        first |= loops
        if not loops and not re.fullmatch(r"(\s|;|done)*", line):
            yield Template(line.strip().split("  #")[0]).substitute(first)


COMMANDS = [command for page in PAGES for command in commands(page)]


@cache
def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documents_is_real(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    assert words[0] in (".venv/bin/python", ".venv/bin/deepspeed")
    if words[1:3] == ["-m", "warm_dist.distributed.torchrun"]:
        del words[1:3]
    first = next(
        k for k, word in enumerate(words) if word == "-m" or word.endswith(".py")
    )  # before it: the launcher's own
    words = words[first:]
    words = words[: words.index("--")] if "--" in words else words  # another program's follow
    script = tuple(words[:2]) if words[0] == "-m" else (words[0],)
    options = [word for word in words[len(script) :] if word.startswith("--")]
    text = help_of(*script, *words[1:2]) if script in (("launch/bench.py",), ("launch/k8s.py",)) else help_of(*script)
    assert all(re.search(rf"{option}\b", text) for option in options)
    if script == ("launch/train.py",):
        sets = [value for flag, value in pairwise(words) if flag == "--set"]
        load_config(ROOT / words[words.index("--config") + 1], sets)
