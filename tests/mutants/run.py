"""A mutation run: each fault of mutants.json, put into a copy of the tracked files, must fail the tests that it names.

`python tests/mutants/run.py [--only ID …] [--jobs N] [--list] [--out FILE]`. First the named tests run without a fault
and must pass. Exit code 0: every fault was caught; 1: one survived, or its entry is wrong; 2: nothing could be tried.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from py_compile import PycInvalidationMode
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIST = "tests/mutants/mutants.json"
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "--timeout", "120"]


class Mutant(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; then one of `tests` must fail. why: what breaks for a user."""

    id: str
    file: str
    old: str
    new: str
    why: str
    tests: list[str]


def read(root: Path) -> list[Mutant]:
    return [Mutant(**entry) for entry in json.loads((root / LIST).read_text(encoding="utf-8"))]


def mutated(mutant: Mutant, text: str) -> str:
    """The text with the fault. Raises ValueError unless `old` occurs once and the result is Python."""
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.old!r} occurs {count} times in {mutant.file}")
    out = text.replace(mutant.old, mutant.new)
    try:
        compile(out, mutant.file, "exec")
    except SyntaxError as error:
        raise ValueError(f"no Python with {mutant.new!r}: {error.msg}") from None
    return out


class Copy:
    """The tracked files in a folder of their own, which Python prefers to what is installed, in child processes too."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.tree, self.scratch = folder / "tree", folder / "scratch"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
        for name in listed.stdout.split("\0"):
            if (root / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.tree / name)
        if (root / ".venv").exists():
            (self.tree / ".venv").symlink_to((root / ".venv").resolve())
        # bytecode trusted by its source's hash: a time stamp in seconds does not tell a fault from its undoing
        compileall.compile_dir(self.tree, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        self.env = {**os.environ, "PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1"}
        for package in {mutant.file.split("/")[0] for mutant in read(root)}:
            self._prove_preferred(package)

    def _prove_preferred(self, package: str) -> None:
        """Plant an ImportError, which a child's child in another folder must meet. Raises RuntimeError."""
        init = self.tree / package / "__init__.py"
        text = init.read_text(encoding="utf-8")
        init.write_text("raise ImportError('planted')\n", encoding="utf-8")
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import {package}'])"
        done = subprocess.run([sys.executable, "-c", code], cwd="/", env=self.env, capture_output=True, text=True)
        init.write_text(text, encoding="utf-8")
        if "planted" not in done.stderr:
            raise RuntimeError(f"{package} is not imported from {self.tree}")

    def pytest(self, tests: list[str]) -> tuple[int, str]:
        """Exit code and output."""
        words = [sys.executable, "-m", "pytest", *PYTEST, "--basetemp", str(self.scratch), *tests]
        done = subprocess.run(words, cwd=self.tree, env=self.env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        """("caught", the first test that failed), ("survived", …) or ("error", what is wrong with the entry)."""
        path = self.tree / mutant.file
        text = path.read_text(encoding="utf-8")
        try:
            path.write_text(mutated(mutant, text), encoding="utf-8")
            code, output = self.pytest(mutant.tests)
        except ValueError as error:
            return "error", str(error)
        finally:
            path.write_text(text, encoding="utf-8")
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.M)
        if code == 1 and failed:
            return "caught", failed[1]
        return ("error", f"pytest ended with {code}: {output[-200:]!r}") if code else ("survived", "no test failed")


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ID", help="these faults alone")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="faults tried at a time, each in its own copy")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args(argv)
    mutants = [mutant for mutant in read(root) if args.only is None or mutant.id in args.only]
    if unknown := set(args.only or ()) - {mutant.id for mutant in mutants}:
        parser.error(f"no fault is called {', '.join(sorted(unknown))}")
    if args.list:
        print("\n".join(f"{mutant.id:30} {mutant.file}: {mutant.why}" for mutant in mutants))
        return 0
    lines, caught, copies = [], 0, SimpleQueue[Copy]()  # copies that are free
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        for number in range(args.jobs):
            copies.put(free := Copy(root, Path(folder) / str(number)))

        def judge(mutant: Mutant) -> tuple[str, str, float]:
            copy, begun = copies.get(), time.monotonic()
            try:
                return *copy.judge(mutant), time.monotonic() - begun
            finally:
                copies.put(copy)

        # a file's tests one after another, so that it makes what they share once
        code, output = free.pytest(sorted({test for mutant in mutants for test in mutant.tests}))
        if code:
            print(f"{output}\nwithout a fault these tests must pass; pytest ended with {code}")
            return 2
        for mutant, (state, found, seconds) in zip(mutants, pool.map(judge, mutants), strict=True):
            caught += state == "caught"
            lines.append(f"{state:8} {mutant.id:30} {seconds:5.1f} s  {mutant.file}: {found}")
            print(lines[-1], flush=True)
    print(f"{caught} of {len(mutants)} caught")
    if args.out:
        args.out.write_text("\n".join([*lines, f"{caught} of {len(mutants)} caught\n"]), encoding="utf-8")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
