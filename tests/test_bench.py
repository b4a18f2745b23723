"""The benchmark on few pictures: its figures are there, everybody sees the same pixels, and missing peers are told."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.benchmarks.data import BATCH, DataBench
from launch.benchmarks.features import FeaturesBench
from launch.benchmarks.features import table as features_table
from launch.benchmarks.pictures import crop, photographs
from launch.benchmarks.result import Spread
from launch.benchmarks.step import StepBench
from launch.benchmarks.step import table as step_table
from tests.processes import ROOT
from warm_dist.errors import ConfigError, WarmDistError

COUNT = 2 * BATCH
PEERS = Path(os.environ.get("WARM_DIST_PEERS_PYTHON", ROOT / ".venv.peers" / "bin" / "python"))


def bench(tmp_path: Path, *arguments: str, peers: Path) -> subprocess.CompletedProcess[str]:
    counts = ["--images", str(COUNT), "--shard-size", str(BATCH), "--rounds", "1"]
    command = [sys.executable, "launch/bench.py", "data", *counts, "--peers-python", str(peers), *arguments]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())  # nothing is left behind
    return done


def check(report: dict[str, Any]) -> None:
    photos = photographs()
    expected = sum(zlib.crc32(crop(photos, number).tobytes()) for number in range(COUNT))
    assert report["checksums"]["npy"] == report["checksums"]["png"] == expected != report["checksums"]["jpg"]
    assert report["payload_bytes"]["npy"] == 64 * 64 * 3 + 128
    assert report["payload_bytes"]["png"] > report["payload_bytes"]["jpg"] > 1000
    for row in report["results"]:
        for name in ("images_per_s", "cpu_us"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]


@pytest.mark.slow
def test_without_peers_ours_is_measured_and_the_way_to_them_is_told(tmp_path: Path) -> None:
    done = bench(tmp_path, "--json", peers=tmp_path / "none" / "python")
    assert done.stderr.strip() == f"peers are skipped: {tmp_path}/none/python does not exist; `make peers` makes it"
    report = json.loads(done.stdout)
    check(report)
    assert [(row["payload"], row["contender"]) for row in report["results"]] == [
        (kind, "ours") for kind in ("npy", "png", "jpg")
    ]
    assert report["skipped"] == done.stderr.strip()
    assert report["ratios"] == []


@pytest.mark.slow
def test_all_contenders_see_the_same_pixels(tmp_path: Path) -> None:
    if not PEERS.exists():
        pytest.skip(f"{PEERS} does not exist; `make peers` makes it, WARM_DIST_PEERS_PYTHON names another")
    report = json.loads(bench(tmp_path, "--json", peers=PEERS).stdout)  # unequal checksums would have ended it
    check(report)
    assert len(report["results"]) == 3 * 4
    assert [ratio["target"] for ratio in report["ratios"]] == [0.45, 0.70, 0.20]
    assert report["versions"]["peers"]["pillow"] == report["versions"]["ours"]["pillow"]


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
    from launch.benchmarks.data import table

    assert len(list(measured.measure(2))) == 2 * 3 * 4
    report = measured.report()
    assert [(ratio["median"], ratio["met"]) for ratio in report["ratios"]] == [(0.25, True), (0.5, True), (0.05, True)]
    text = table(report)
    assert re.search(r"^PNG +webdataset, boto3 body +200 +200\.\.200 +2\.0 +2\.0\.\.2\.0$", text, re.M)
    assert re.search(r"^ours PNG / webdataset, pipe:aws PNG +0\.250 +0\.250\.\.0\.250 +target 0\.45: met$", text, re.M)


def test_other_pixels_end_it(measured: DataBench) -> None:
    measured.checksums["png"] = 8
    with pytest.raises(WarmDistError, match="ours sees other pixels in the png images"):
        list(measured.measure(1))


def test_spread_of_rounds() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


@pytest.mark.slow
def test_a_step_is_measured(tmp_path: Path) -> None:
    tiny = ["--rounds", "1", "--log-steps", "2", "--lines", "2", "--images", "2", "--set", "network.channels=8"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "launch/bench.py", "step", *tiny, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())  # nothing is left behind
    report = json.loads(done.stdout)
    assert report["runs"].keys() == {"bare", "one", "mirror", "2 ranks"}
    for name, run in report["runs"].items():
        assert run["wall_s"]["median"] >= sum(
            run[f"{place}_s"]["median"] for place in ("forward", "backward", "update")
        )
        assert (run["side_s"]["median"] > 0) == (name != "bare")
        assert (run["mirror_s"]["median"] > 0) == (name == "mirror")
    assert report["side"]["median"] > 0
    assert report["speedup"]["2 ranks"]["expected"]["median"] > 0


def test_a_step_needs_positive_counts() -> None:
    command = [sys.executable, "launch/bench.py", "step", "--lines", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ConfigError.exit_code
    assert "--lines at least 2" in done.stderr


def step_report(side_s: float, many_images_per_s: float) -> dict[str, Any]:
    """Two rounds of made-up runs: a step of 100 ms of which `side_s` is for EMAs and metrics; 20 images a second alone."""
    args = argparse.Namespace(ranks=[2], rounds=2, images=2, log_steps=5, config="configs/quickstart.json", set=[])
    bench = StepBench(args, Path(), "http://127.0.0.1:1")
    places = dict.fromkeys(("data_s", "forward_s", "backward_s", "update_s", "ema_s"), 0.02)
    one = {"wall_s": 0.1, "process_s": 0.1, "main_s": 0.1 + side_s, "side_s": side_s, "mirror_s": 0.001, **places}
    one |= {"mirror_start_s": 3.0, "images_per_s": 20.0, "parameters": 1e6, "flops": 1e9, "bandwidth": 1e9}
    bench.runs = {name: [one, one] for name in ("bare", "one", "mirror")}
    bench.runs["2 ranks"] = [one | {"images_per_s": many_images_per_s}] * 2
    return bench.report()


@pytest.mark.parametrize(("side_s", "speed", "side", "speedup"), [(0.0005, 38, True, True), (0.002, 35, False, False)])
def test_verdicts_of_a_step(side_s: float, speed: float, side: bool, speedup: bool) -> None:
    report = step_report(side_s, speed)
    assert report["side"]["median"] == pytest.approx((side_s + 0.001) / 0.1)  # the mirror's millisecond counts
    assert report["side"]["met"] is side
    assert report["speedup"]["2 ranks"]["median"] == pytest.approx(speed / 40)
    text = step_table(report)
    assert re.search(rf"^together .* target 2: {'met' if side else 'missed'}$", text, re.M)
    assert report["speedup"]["2 ranks"]["target"] == (0.9 if (os.cpu_count() or 1) > 1 else None)
    if (os.cpu_count() or 1) > 1:
        assert re.search(rf"^2 ranks .* target 0.9: {'met' if speedup else 'missed'}$", text, re.M)


@pytest.mark.slow
def test_features_are_measured(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "launch/bench.py", "features", "--num-images", "4", "--rounds", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("warm-dist-*"))  # nothing of ours is left behind
    report = json.loads(done.stdout)
    assert report["cpu_ms"].keys() == {"clean-fid", "ours", "ours, bf16"}
    assert min(found["median"] for found in report["cpu_ms"].values()) > 1
    assert report["distance_s"].keys() == {"4096", "1000"}
    assert report["bf16"]["float32"] > 0
    assert 0 < abs(report["bf16"]["relative"]) < 0.1


def test_features_need_images() -> None:
    command = [sys.executable, "launch/bench.py", "features", "--num-images", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ConfigError.exit_code
    assert "--num-images must be at least 4" in done.stderr


@pytest.mark.parametrize(("ours", "bf16", "distance_s", "met"), [(70, 30, 2.0, True), (90, 50, 4.0, False)])
def test_verdicts_of_features(ours: float, bf16: float, distance_s: float, met: bool) -> None:
    bench = FeaturesBench({}, torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    bench.cpu_ms = {"clean-fid": [100.0, 100.0], "ours": [ours, ours], "ours, bf16": [bf16, bf16]}
    bench.distance_s = {4096: [distance_s, distance_s]}
    report = bench.report()
    assert report["ratios"]["ours"]["median"] == pytest.approx(ours / 100)
    text = features_table(report | {"bf16": {"float32": 2.0, "bf16": 2.1, "error": 0.1, "relative": 0.05}})
    word = "met" if met else "missed"
    for name, target in (("ours", "0.8"), ("ours, bf16", "0.4"), ("4096 images each", "3")):
        assert re.search(rf"^{name} .* target {target}: {word}$", text, re.M)
    assert text.endswith("error +0.1000 (+5.00%)")


def test_pictures_are_the_same_in_every_run_and_differ() -> None:
    photos = photographs()
    images = [crop(photos, number) for number in range(50)]
    assert all(image.shape == (64, 64, 3) for image in images)
    assert len({image.tobytes() for image in images}) == 50
    assert zlib.crc32(images[0].tobytes()) == 2017775910  # what `crop(photographs(), 0)` gave when this was written
