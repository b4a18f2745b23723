"""ZeRO's fragments on two real ranks: put together, they are the network."""

from __future__ import annotations

import json

import pytest

from tests.support.processes import ROOT
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)
WORKER = str(ROOT / "tests/support/engine_worker.py")


def test_every_shard_says_where_it_lies(tmp_path):
    """A wrong start, offset or length of a fragment would put the values of checkpoints and EMAs elsewhere."""
    for done in run_ranks(WORKER, str(tmp_path), "found", "shards", size=2, timeout_s=180):
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "found.json").read_text())["shards"] == dict.fromkeys("0123", 0.0)
