"""The data benchmark's table, and what ends it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from launch.benchmarks.data import DataBench
from warm_dist.errors import WarmDistError


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataBench:
    """Two rounds of made-up runs of everybody."""
    out = DataBench(None, tmp_path, 100, 50, Path("python"))  # type: ignore[arg-type]
    cost = {"ours": 1.0, "pipe:aws": 4.0, "boto3": 2.0, "streaming": 3.0}

    def run(contender: str, job: dict[str, Any]) -> dict[str, Any]:
        cpu_s = 100e-6 * cost[contender] * (0.1 if job["payload"] == "npy" else 1)
        return {"images": 100, "wall_s": 0.5, "cpu_s": cpu_s, "checksum": 7, "versions": {"pillow": "1"}}

    monkeypatch.setattr(out, "_run", run)
    monkeypatch.setattr(out, "_mds", lambda kind, name: "")
    out.jobs = {kind: {"payload": kind} for kind in ("npy", "png", "jpg")}
    out.payload_bytes = dict.fromkeys(out.jobs, 9.0)
    return out


def test_the_table_has_the_figures(measured: DataBench) -> None:
    """Fault: a ratio is upside down, or figures have another unit than their heading says."""
    from launch.benchmarks.data import table

    assert len(list(measured.measure(2))) == 2 * 3 * 4
    report = measured.report()
    assert [(ratio["median"], ratio["met"]) for ratio in report["ratios"]] == [(0.25, True), (0.5, True), (0.05, True)]
    text = table(report)
    assert re.search(r"^PNG +webdataset, boto3 body +200 +200\.\.200 +2\.0 +2\.0\.\.2\.0$", text, re.M)
    assert re.search(r"^ours PNG / webdataset, pipe:aws PNG +0\.250 +0\.250\.\.0\.250 +target 0\.45: met$", text, re.M)


def test_other_pixels_end_it(measured: DataBench) -> None:
    """Fault: a reader that decodes other pixels is timed all the same."""
    measured.checksums["png"] = 8
    with pytest.raises(WarmDistError, match="ours sees other pixels in the png images"):
        list(measured.measure(1))
