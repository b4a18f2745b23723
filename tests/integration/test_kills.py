"""kill -9 at every phase of a save, to the folder and to a real S3, then the same again; see killed.py."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from tests.support.killed import BATCH, LARGE, PHASES, SAVE_STEPS, STEPS
from tests.support.zygote import zygote

FRESH = [f"{phase}, on a fresh machine" for phase in PHASES if "store" in phase or "upload" in phase]
# the second save is whole once COMPLETE is there: in the folder, or where only the store is left, in the store
WHOLE = {"after COMPLETE", *(phase for phase in PHASES if "store" in phase or "upload" in phase or "prun" in phase)}
WHOLE |= {name for name in FRESH if name.startswith("after")}


@pytest.fixture(scope="module")
def results(s3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("kills")
    story = zygote().start(
        "-m", "tests.support.killed", str(root), env={**os.environ, "S3_ENDPOINT_URL": s3.endpoint_url}
    )
    _, err = story.communicate(400)
    assert story.returncode == 0, err[-3000:]
    return json.loads((root / "results.json").read_text())


@pytest.mark.parametrize("phase", [*PHASES, *FRESH])
def test_killed_and_resumed_equals_unbroken(results, phase):
    found, whole = results[phase], results[f"unbroken, {LARGE}" if phase.startswith(LARGE) else "unbroken"]
    assert found["killed"] == [-signal.SIGKILL]
    assert found["statuses"] == [0, 0]
    assert found["resumed at"] == BATCH * SAVE_STEPS * (2 if phase in WHOLE else 1)
    assert len(found["losses"]) == STEPS
    assert found["losses"] == whole["losses"]
    assert found["digest"] == whole["digest"]
    assert found["each image once"]


@pytest.mark.parametrize("phase", [*PHASES, *FRESH])
def test_the_store_holds_the_last_checkpoint_and_no_other(results, phase):
    assert results[phase]["store"] == [f"checkpoints/{BATCH * STEPS:012d}"]
