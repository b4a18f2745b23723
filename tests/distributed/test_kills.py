"""kill -9 at every phase of a save, to the folder and to a real S3, then the same again; see killed.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.distributed.killed import BATCH, PHASES, SAVE_STEPS, STEPS
from tests.processes import ROOT

pytestmark = pytest.mark.slow
FRESH = [f"{phase}, on a fresh machine" for phase in PHASES if "store" in phase or "upload" in phase]
# the second save is whole once COMPLETE is there: in the folder, or where only the store is left, in the store
WHOLE = {"after COMPLETE", *(phase for phase in PHASES if "store" in phase or "upload" in phase or "prun" in phase)}
WHOLE |= {name for name in FRESH if name.startswith("after")}


@pytest.fixture(scope="module")
def results(s3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("kills")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "S3_ENDPOINT_URL": s3.endpoint_url}
    command = [sys.executable, "-m", "tests.distributed.killed", str(root)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "results.json").read_text())


@pytest.mark.parametrize("phase", [*PHASES, *FRESH])
def test_killed_and_resumed_equals_unbroken(results, phase):
    found, whole = results[phase], results["unbroken"]
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
