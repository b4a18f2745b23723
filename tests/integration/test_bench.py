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


SMALL = {
    "data.resolution": 16,
    "network.channels": 32,
    "network.channel_mult": [1],
    "network.num_blocks": 1,
    "network.attention_resolutions": [],
    "sampler.num_steps": 2,
}


def gpu(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What `bench.py gpu` reports of two rounds of a tiny network on the processor."""
    small = [word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    common = ["--device", "cpu", "--images", "2", "--rounds", "2", "--json", *small]
    found: dict[str, Any] = json.loads(launch(tmp_path, "gpu", *common, *arguments).stdout)
    return found


def test_a_device_is_measured_without_peers(tmp_path: Path) -> None:
    """Fault: a contender that is never called, figures of a GPU on a processor, or an error for want of peers."""
    names = ["local-bf16", "zero1-fp32", "sampling-fp32", "evaluation-bf16"]
    none = ["--peers-python", str(tmp_path / "none"), "--contenders", *names, "diffusers-bf16"]
    found = gpu(tmp_path, *none)
    assert [*found["rows"]] == names
    assert found["skipped"] == f"peers are skipped: {tmp_path}/none does not exist; `make peers` makes it"
    assert found["failed"] == {}
    assert found["unreached"] == []
    for row in found["rows"].values():
        assert row["rounds"] == 2
        assert 0 < row["images_per_s"]["min"] <= row["images_per_s"]["median"] <= row["images_per_s"]["max"]
        assert [row[key] for key in ("mfu", "peak_gib", "wait_share", "compile_s")] == [None] * 4
    # lite0 alone takes 16 ms an image
    samples, evaluation = (found["rows"][name]["seconds"]["median"] for name in names[2:])
    assert evaluation > samples


def test_what_the_budget_leaves_out_is_listed(tmp_path: Path) -> None:
    """Fault: one contender's failure ends the command, or compiling goes on beyond the budget."""
    few = ["--set", "parallel.peak_flops=1e12", "--contenders", "local-fp32", "local-fp32-compiled", "zero2-bf16"]
    cold = ["--set", f"parallel.compile_cache={tmp_path}/kernels"]
    found = gpu(tmp_path, *few, *cold, "--budget", "16")
    assert [*found["rows"]] == ["local-fp32"]
    assert found["rows"]["local-fp32"]["rounds"] == 2
    assert found["rows"]["local-fp32"]["mfu"] > 0
    assert (found["cut_off"], found["unreached"]) == (["local-fp32-compiled"], ["zero2-bf16"])
    assert found["took_s"] < 24  # the compiler is let go a moment later


@pytest.mark.parametrize("peer", ["diffusers-bf16", "denoising_diffusion_pytorch-bf16"])
def test_a_peer_takes_its_turns(tmp_path: Path, peer: str) -> None:
    """Fault: a peer's answer is read out of turn, or its network is not the size of ours."""
    if not PEERS.exists():
        pytest.skip(f"{PEERS} does not exist; `make peers` makes it, WARM_DIST_PEERS_PYTHON names another")
    found = gpu(tmp_path, "--peers-python", str(PEERS), "--contenders", "local-bf16", peer)
    assert (found["failed"], found["unreached"], [*found["rows"]]) == ({}, [], ["local-bf16", peer])
    row = found["rows"][peer]
    assert (row["rounds"], row["compile_s"]) == (2, None)
    assert row["images_per_s"]["min"] > 0
    assert 0.2 < row["flops_per_image"] / found["rows"]["local-bf16"]["flops_per_image"] < 5
    assert row["versions"]["torch"]
