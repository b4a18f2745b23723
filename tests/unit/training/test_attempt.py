"""An attempt's end: what is said of an error, and what exit.json keeps."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from warm_dist.distributed.world import World
from warm_dist.errors import OutputError
from warm_dist.runs.folder import EXIT, read_end
from warm_dist.training.attempt import Attempt


def attempt_that(path: Path, train: Callable[[], None]) -> Attempt:
    """An attempt of one rank at the run in `path` whose training is `train`."""
    attempt = object.__new__(Attempt)
    attempt.world, attempt.path = World(0, 1, torch.device("cpu"), None), path
    attempt.claim, attempt.number, attempt.nimg = None, 0, 0
    attempt.heartbeat = contextlib.nullcontext()  # type: ignore[assignment]
    attempt._train = train  # type: ignore[method-assign]
    return attempt


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_goes_amid_a_save_is_named_as_that(tmp_path: Path, replaced: bool) -> None:
    """Fault: "COMPLETE: cannot be written (No such file or directory)", and another run's exit.json is written."""

    def train() -> None:
        shutil.rmtree(tmp_path / "run")
        if replaced:
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / ".lock").touch()
        raise OutputError("COMPLETE: cannot be written (No such file or directory)")

    with pytest.raises(OutputError, match="run: was removed or replaced while this run trained in it"):
        attempt_that(tmp_path / "run", train).run()
    assert not (tmp_path / "run" / EXIT).exists()


def test_any_other_error_of_output_is_told_as_it_is(tmp_path: Path) -> None:
    def train() -> None:
        raise OutputError("COMPLETE: cannot be written (Read-only file system)")

    with pytest.raises(OutputError, match=r"^COMPLETE: cannot be written"):
        attempt_that(tmp_path / "run", train).run()
    end = read_end(tmp_path / "run")
    assert end is not None
    assert (end.code, end.resumable) == (8, False)
