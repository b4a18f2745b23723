"""Packing in several processes, to S3, and killed at any moment."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_pipelines import index
from data_pipelines.pack import Packing, pack
from data_pipelines.shards.manifest import NAME, read_manifest
from data_pipelines.sources.open import open_source
from tests.support.packing import contents, damages, noise_source, png
from warm_dist.errors import BucketError

if TYPE_CHECKING:
    from tests.support.packed import Packed


def test_several_processes_pack_index_and_verify_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: an order of images or shards that depends on which worker finishes first."""
    source = open_source("digits", 8)
    manifest = pack(source, str(tmp_path / "one"), shard_size=100)
    told: list[int] = []
    packing = Packing(source, str(tmp_path / "two"), shard_size=100)
    packing.run(workers=2, progress=told.append)
    packing.finish()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum(told) == 1797
    shard = tmp_path / "two" / manifest.shards[4].name
    shard.write_bytes(shard.read_bytes()[:-1024] + bytes(1023) + b"x")
    assert damages(manifest, str(tmp_path / "two"), workers=2) == [
        f"shard {shard.name}: sha256 differs from the manifest's"
    ]
    monkeypatch.setattr(sys, "argv", ["index", str(tmp_path / "one"), "--workers", "2"])
    index.main()
    again = read_manifest(f"{tmp_path}/one/{NAME}")
    assert "1797 images in 18 shards" in capsys.readouterr().out
    for name in ("key", "label", "offset", "length", "crc32"):
        assert np.array_equal(getattr(again, name), getattr(manifest, name)), name
    assert np.array_equal(again.info.power_spectrum, manifest.info.power_spectrum)


def test_packing_to_s3(digits: Packed) -> None:
    """Fault: a manifest on S3 that differs from what was packed, or a missing bucket that is not named."""
    assert digits.manifest.info.num_images == 1797
    assert damages(digits.manifest, digits.url, digits.endpoint_url) == []
    read = read_manifest(digits.manifest_url, digits.endpoint_url)
    assert read.info.fingerprint == digits.manifest.info.fingerprint
    with pytest.raises(BucketError, match="no-such-bucket"):
        pack(noise_source(2), "s3://no-such-bucket/x", digits.endpoint_url)


def test_killed_at_any_moment_the_same_command_makes_the_same_bytes(tmp_path: Path) -> None:
    """Two processes and three parts, kill -9 in the middle: no process stays, and what was done is not done again."""
    (tmp_path / "in").mkdir()
    for number in range(300):
        (tmp_path / "in" / f"{number}.png").write_bytes(png(number, 64))

    def command(out: str, *more: str) -> list[str]:
        words = ["data_pipelines.pack", str(tmp_path / "in"), str(tmp_path / out), "--resolution", "32"]
        return [sys.executable, "-m", *words, "--shuffle", "--shard-size", "4", *more]

    subprocess.run(command("whole", "--workers", "1"), check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command("out", "--workers", "2"), start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "out").rglob("*.npz"))) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while session_members(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
    assert not (tmp_path / "out" / NAME).exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npz")}
    assert 5 <= len(done) < 75
    for share in ("2/3", "1/3", "3/3"):
        told = subprocess.run(
            command("out", "--part", share, "--workers", "1"), check=True, capture_output=True, text=True
        ).stdout
        assert f"part {share} is packed" in told
    assert {path: path.stat().st_mtime_ns for path in done} == done
    subprocess.run(command("out", "--workers", "1"), check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def session_members(session: int) -> list[str]:
    """Processes of a session that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(stat.parent.name)
    return found
