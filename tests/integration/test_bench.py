"""The benchmark on few pictures: its figures are there, everybody sees the same pixels, and missing peers are told."""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest

from launch.benchmarks.data import BATCH
from launch.benchmarks.pictures import crop, photographs
from tests.support.paths import ROOT
from tests.support.zygote import zygote

COUNT = 2 * BATCH
PEERS = Path(os.environ.get("WARM_DIST_PEERS_PYTHON", ROOT / ".venv.peers" / "bin" / "python"))


def bench(tmp_path: Path, *arguments: str, peers: Path) -> subprocess.CompletedProcess[str]:
    counts = ["--images", str(COUNT), "--shard-size", str(BATCH), "--rounds", "1"]
    return launch(tmp_path, "data", *counts, "--peers-python", str(peers), *arguments)


def launch(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """launch/bench.py to its good end; nothing is left behind."""
    done = zygote().run(ROOT / "launch" / "bench.py", *arguments, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("warm-dist-*"))
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


def test_all_contenders_see_the_same_pixels(tmp_path: Path) -> None:
    if not PEERS.exists():
        pytest.skip(f"{PEERS} does not exist; `make peers` makes it, WARM_DIST_PEERS_PYTHON names another")
    report = json.loads(bench(tmp_path, "--json", peers=PEERS).stdout)  # unequal checksums would have ended it
    check(report)
    assert len(report["results"]) == 3 * 4
    assert [ratio["target"] for ratio in report["ratios"]] == [0.45, 0.70, 0.20]
    assert report["versions"]["peers"]["pillow"] == report["versions"]["ours"]["pillow"]


@pytest.mark.parametrize("mirror", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_step_is_measured(tmp_path: Path, mirror: bool) -> None:
    """Fault: EMAs and metrics charged to the run without them, or a phase of the step counted twice."""
    tiny = ["--rounds", "1", "--log-steps", "2", "--lines", "2", "--images", "2", "--set", "network.channels=8"]
    tiny += [] if mirror else ["--no-mirror", "--set", "engine=local"]
    report = json.loads(launch(tmp_path, "step", *tiny, "--json").stdout)
    assert report["runs"].keys() == {"bare", "one", "2 ranks"} | ({"mirror"} if mirror else set())
    for name, run in report["runs"].items():
        assert run["wall_s"]["median"] >= sum(
            run[f"{place}_s"]["median"] for place in ("forward", "backward", "update")
        )
        assert (run["side_s"]["median"] > 0) == (name != "bare")
        assert (run["mirror_s"]["median"] > 0) == (name == "mirror")
    assert report["side"]["median"] > 0
    assert report["speedup"]["2 ranks"]["expected"]["median"] > 0


def test_features_are_measured(tmp_path: Path) -> None:
    """Fault: a bf16 contender that computes in float32, or timing code that never calls the contender."""
    report = json.loads(launch(tmp_path, "features", "--num-images", "4", "--rounds", "1", "--json").stdout)
    assert report["cpu_ms"].keys() == {"clean-fid", "ours", "ours, bf16"}
    assert min(found["median"] for found in report["cpu_ms"].values()) > 1
    assert report["distance_s"].keys() == {"4096", "1000"}
    assert report["bf16"]["float32"] > 0
    assert 0 < abs(report["bf16"]["relative"]) < 0.1


def test_engines_are_compared_with_the_local_one_of_their_precision(tmp_path: Path) -> None:
    few = ["--set", "network.num_blocks=1", "--set", "network.channel_mult=[1]"]
    done = launch(tmp_path, "host", "--rounds", "1", "--engines", "local", "zero1", "zero3", "--json", *few)
    report = json.loads(done.stdout)
    names = [f"{engine} {precision}" for precision in ("fp32", "bf16") for engine in ("local", "zero1", "zero3")]
    assert [*report["ms"]] == names
    for name, ratio in report["ratios"].items():
        local = report["ms"][f"local {name.split()[1]}"]["median"]
        assert ratio["median"] == pytest.approx(report["ms"][name]["median"] / local)
        assert ratio["met"] == (ratio["median"] <= ratio["target"])
    assert len(report["ratios"]) == 4
    assert report["inputs"].keys() == {"cifar10", "imagenet64"}
