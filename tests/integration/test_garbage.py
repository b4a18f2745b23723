"""Garbage in a run's folder: the run goes on to the same weights, or one line names the file; no traceback, no hang."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.training import BATCH, STEPS, finish, fork

LAST = f"checkpoints/{BATCH * 12:012d}"
FILES = ("run.json", "exit.json", "metrics.jsonl", "config.json", "mirror.json", ".lock", "heartbeat/rank_0.json", "heartbeat",
         f"{LAST}/COMPLETE", f"{LAST}/rank_0.done", f"{LAST}/rank_0.safetensors", LAST, "weights/ema.safetensors", "weights")  # fmt: skip


def _folder(path: Path, data: bytes) -> None:
    path.mkdir()
    (path / "x").write_text("x")


def _written(content: Callable[[bytes], bytes]) -> Callable[[Path, bytes], object]:
    return lambda path, data: path.write_bytes(content(data))


KINDS: dict[str, Callable[[Path, bytes], object]] = {
    "nothing": lambda path, data: None,
    "empty": _written(lambda data: b""),
    "cut": _written(lambda data: data[: len(data) // 2]),
    "zeros": _written(lambda data: bytes(len(data))),
    "a flipped bit": _written(lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:] if len(data) > 9 else b"?"),
    "other types": _written(lambda data: b'{"code": [], "attempt": "x", "nimg": {}, "format": 3}'),
    "a list": _written(lambda data: b"[1, 2]"),
    "a huge number": _written(lambda data: b'{"attempt": ' + b"9" * 5000 + b"}\n"),
    "no finite number": _written(lambda data: b'{"attempt": 1e999, "nimg": NaN}\n'),
    "depth": _written(lambda data: b"[" * 100_000),
    "no text": _written(lambda data: random.Random(0).randbytes(300)),
    "a folder": _folder,
    "a FIFO": lambda path, data: os.mkfifo(path),
    "a link to itself": lambda path, data: path.symlink_to(path),
}
EVERY = [(file, kind) for file in FILES for kind in KINDS]
FEW = [(file, kind) for number, file in enumerate(FILES[:9]) for kind in list(KINDS)[number + 2 :: 9]]


@pytest.fixture(scope="module")
def stopped(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a run that has checkpoints at steps 8 and 12, and the weights that it comes to at step 20."""
    run = tmp_path_factory.mktemp("garbage") / "run"
    code, _, err = finish(fork(config_file, run, f"train.total_nimg={BATCH * 12}"))
    assert code == 0, err
    whole = run.with_name("whole")
    shutil.copytree(run, whole)
    code, _, err = finish(fork(config_file, whole))
    assert code == 0, err
    return run, whole / "weights" / "ema.safetensors"


@pytest.mark.parametrize(
    ("file", "kind"),
    [pytest.param(*case, marks=[] if case in FEW else [pytest.mark.soak]) for case in EVERY],
)
def test_garbage_in_a_run_s_folder(
    stopped: tuple[Path, Path], config_file: Path, tmp_path: Path, file: str, kind: str
) -> None:
    """Fault: a traceback, a process that waits for ever, or other weights without a word."""
    run, weights = tmp_path / "run", stopped[1]
    shutil.copytree(stopped[0], run)
    path = run / file
    data = path.read_bytes() if path.is_file() else b""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    KINDS[kind](path, data)
    code, _, err = finish(fork(config_file, run), timeout_s=120)
    assert "Traceback" not in err
    if code == 0:
        ours, expected = load_file(run / "weights" / "ema.safetensors"), load_file(weights)
        assert all((ours[name] == value).all() for name, value in expected.items())
    else:
        assert code in (4, 8)
        assert file.partition("/")[0].removeprefix(".lock") in err
        assert "Error: " in err
    assert len(list((run / "checkpoints").iterdir())) >= 2, f"{BATCH * STEPS} images"
