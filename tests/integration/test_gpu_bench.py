"""`bench.py gpu` on a GPU: that its figures can be true. Skipped loudly without one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.benchmarks.contenders import changed, unlogged
from launch.benchmarks.peers.network import Subject
from tests.support.paths import ROOT
from warm_dist.networks.flops import known_peak, size_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: bench.py gpu is not tested here"),
]
NAMES = ["local-bf16-compiled", "zero1-bf16", "sampling-bf16"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Three contenders of cifar10.json's network with half its blocks, in a process of its own."""
    words = ["--images", "64", "--rounds", "2", "--budget", "200", "--json", "--set", "network.num_blocks=2"]
    command = [sys.executable, "launch/bench.py", "gpu", *words, "--contenders", *NAMES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_figures_of_a_gpu_can_be_true(found: dict[str, Any], tmp_path: Path) -> None:
    """Fault: memory of one contender charged to another, a wait that is no share, operations counted for another batch."""
    assert found["failed"] == {}
    assert {*found["rows"]} | {*found["unreached"]} == {*NAMES}
    assert found["took_s"] < 200
    keys = unlogged(64) | {"output": str(tmp_path)}
    parameters = size_of(changed(ROOT / "configs" / "cifar10.json", keys, ["network.num_blocks=2"])).parameters
    for name, row in found["rows"].items():
        training = not name.startswith("sampling")
        assert 0 <= row["wait_share"] < 1
        # weights and both moments in float32, and three averages; sampling has weights alone
        assert row["state_gib"] * 2**30 >= 4 * parameters * (6 if training else 1)
        assert row["state_gib"] < row["peak_gib"] < 20
        if known_peak(found["device"], "bf16"):
            assert row["mfu"] is None or 0 < row["mfu"] < 1
            assert (row["mfu"] is not None) == training


def test_compiling_is_apart_from_the_steps(found: dict[str, Any]) -> None:
    """Fault: the first step is in the figures."""
    row = found["rows"][NAMES[0]]
    assert row["compile_s"] > row["seconds"]["max"]
    assert row["cached"] in (True, False)
    assert row["images_per_s"]["min"] > 0.5 * row["images_per_s"]["max"]


def test_a_kernel_that_runs_is_no_wait_and_a_pause_is_one() -> None:
    """Fault: the profiler sees no kernel, or its microseconds are taken for other units; or others' memory is counted."""
    device = torch.device("cuda")
    others = torch.zeros(1 << 28, device=device)
    cycles = 200_000_000  # some 0.1 s
    busy = Subject(lambda: lambda: torch.cuda._sleep(cycles), device, 8, 2)
    idle = Subject(lambda: lambda: (torch.cuda._sleep(cycles), torch.cuda.synchronize(), time.sleep(0.3)), device, 8, 2)
    shares = busy.wait_share(), idle.wait_share()
    assert None not in shares
    assert shares[0] < 0.1
    assert 0.5 < shares[1] < 1
    kept: list[torch.Tensor] = [torch.zeros(1 << 20, device=device)]
    state = Subject(lambda: lambda: kept.__setitem__(0, torch.zeros(1 << 24, device=device)), device, 4, 1)
    assert state.state == (1 << 26) - (1 << 22)  # the small tensor was there before
    assert 1 << 26 <= state.round()["peak"] <= 1 << 28
    assert len(others) == 1 << 28
