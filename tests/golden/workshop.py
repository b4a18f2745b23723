"""A folder in which the product's commands run as people run them, with nothing of this shell in what they print."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, NamedTuple

from tests.support.processes import free_port
from tests.support.zygote import Zygote

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900  # of one command: the machine may be busy
PRELOADED = ["torch", "torch._dynamo", "deepspeed", "pyarrow.parquet", "scipy.linalg"]
"""Imported once, in the process that every command is forked from: three quarters of a short training otherwise."""
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RAY_ADDRESS")


class Command(NamedTuple):
    """words: a script of launch/, or -m and a module, and its arguments. size: ranks. variables: more of the environment."""

    words: Sequence[str]
    size: int = 1
    variables: tuple[tuple[str, str], ...] = ()


class Ended(NamedTuple):
    """How a command ended; of several ranks the first, or the first that failed."""

    code: int
    out: str
    err: str


class CommandError(Exception):
    """A command that had to succeed and did not, or did not end."""


class Workshop:
    """Commands run in `folder`, and name everything in it by relative paths: so no file holds the folder's own name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        os.environ.update(environment())  # for the zygote, before libraries read it
        self._zygote = Zygote(PRELOADED)

    # -- commands ---------------------------------------------------------------------------------------------------

    def run(self, commands: Sequence[Command], cwd: Path | None = None) -> list[Ended]:
        """All commands to their ends, whatever their exit codes, two at a time. cwd: instead of the folder."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda command: self._run(command, cwd or self.folder), commands))

    def out(self, *commands: Sequence[str] | Command, cwd: Path | None = None) -> list[str]:
        """What each command prints. Raises CommandError unless all succeed."""
        given = [command if isinstance(command, Command) else Command(command) for command in commands]
        ended = self.run(given, cwd)
        for command, end in zip(given, ended, strict=True):
            if end.code:
                raise CommandError(f"{' '.join(command.words)}: exit code {end.code}\n{end.err or end.out}")
        return [end.out for end in ended]

    def _run(self, command: Command, cwd: Path) -> Ended:
        shared = dict(command.variables)
        if command.size > 1:
            shared |= {"WORLD_SIZE": str(command.size), "LOCAL_WORLD_SIZE": str(command.size)}
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        first, *rest = command.words
        words = first if first == "-m" else str(ROOT / first), *rest
        ranks = []
        for rank in range(command.size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if command.size > 1 else {}
            ranks.append(self._zygote.start(*words, env=environment() | shared | own, cwd=cwd))
        try:
            said = [rank.communicate(TIMEOUT_S) for rank in ranks]
        except TimeoutExpired:
            raise CommandError(f"{' '.join(command.words)}: not ended after {TIMEOUT_S} s") from None
        finally:
            for rank in ranks:
                rank.kill()
        code, texts = next(
            ((rank.wait(), texts) for rank, texts in zip(ranks, said, strict=True) if rank.wait()), (0, said[0])
        )
        return Ended(code, *map(self.plain, texts))

    # -- what they leave --------------------------------------------------------------------------------------------

    def plain(self, text: str) -> str:
        """The text without where this folder, the checkout, and objects in memory are."""
        text = text.replace(str(self.folder), "<tmp>").replace(str(ROOT), "<root>")
        return re.sub(r"\b0x[0-9a-f]+", "<address>", text)

    def sha(self, path: str) -> str:
        """Of a file in the folder."""
        return sha((self.folder / path).read_bytes())

    def write_json(self, path: str, tree: Any) -> None:
        (self.folder / path).write_text(json.dumps(tree, indent=1))


def sha(data: bytes | str) -> str:
    """The first 16 hex digits of the sha256: no two of a few thousand values meet by chance."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def environment() -> dict[str, str]:
    """This process's variables, but for what other values would come with."""
    kept = {key: value for key, value in os.environ.items() if key not in _FOREIGN and not key.startswith("AWS_")}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "100",
        "DS_ACCELERATOR": "cpu",
        "LC_ALL": "C.UTF-8",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TERM": "dumb",
    }
