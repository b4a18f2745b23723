"""launch/train.py with checkpoints on S3, on a full disk, and with everything that is measured: real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipelines.pack import pack
from data_pipelines.sources.open import open_source
from tests.support.packing import contents, noise_source
from tests.support.paths import ROOT
from tests.support.processes import free_port, wait_for
from tests.support.training import BATCH, STEPS, finish, fork, fork_ranks, losses, outcome, reached
from tests.support.zygote import zygote
from warm_dist import errors
from warm_dist.checkpoints.export import export_tensors
from warm_dist.checkpoints.format import (
    CHECKPOINTS,
    SNAPSHOTS,
    complete_names,
    name_of,
    nimg_of,
    open_saved,
)
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.checkpoints.weights import load_weights
from warm_dist.config.run import CheckpointConfig
from warm_dist.distributed.world import World
from warm_dist.networks.flat import Published, published
from warm_dist.runs.metrics import read_metrics
from warm_dist.store.open import open_store
from warm_dist.store.seaweedfs import S3Server

LAST = BATCH * STEPS


@pytest.fixture(scope="module")
def local_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in a folder, so that S3 is the checkpoints' alone."""
    root = tmp_path_factory.mktemp("local")
    pack(open_source("digits", 8), str(root / "digits"), None, shard_size=1000)
    tree = {
        "output": "unset",
        "engine": "local",
        "data": {"manifest": str(root / "digits" / "manifest.parquet"), "resolution": 8, "channels": 1,
                 "num_classes": 10, "num_lanes": 8, "chunk": 16},
        "process": {"bnr": 0.5},
        "network": {"arch": "ddpmpp", "channels": 16, "channel_mult": [1, 2], "num_blocks": 1},
        "train": {"total_nimg": LAST, "batch_size": BATCH, "lr": 1e-3, "eps": 1e-4, "ema_half_life_nimg": 100,
                  "log_nimg": BATCH, "save_nimg": BATCH * 4, "ema_lengths": [0.05, 0.1], "snapshot_nimg": 2 * BATCH},
    }  # fmt: skip
    path = root / "digits.json"
    path.write_text(json.dumps(tree))
    return path


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return zygote().run(ROOT / "launch" / name, *arguments)


def train(config: Path, run: Path, *overrides: str, size: int = 2) -> tuple[list[int], str, str]:
    """Ranks to their end: their exit codes, what rank 0 said on stdout, what all said on stderr."""
    ends = [finish(rank) for rank in fork_ranks(config, run, *overrides, size=size)]
    return [code for code, _, _ in ends], ends[0][1], "".join(err for _, _, err in ends)


def test_checkpoints_and_snapshots_go_to_s3_and_weights_come_from_there(s3: S3Server, local_config, tmp_path):
    url, run = "s3://warm-dist/survive", tmp_path / "run"
    settings = ["engine=deepspeed", f"checkpoint.url={url}", f"checkpoint.endpoint_url={s3.endpoint_url}"]
    codes, _, err = train(local_config, run, *settings, "train.total_nimg=80")
    assert codes == [0, 0], err
    shutil.rmtree(run)  # the machine is lost
    codes, out, err = train(local_config, run, *settings)
    assert codes == [0, 0], err
    assert f"resumed at nimg 80 from {url}/checkpoints/{80:012d}" in out
    store = open_store(url, s3.endpoint_url)
    records = read_metrics(run / "metrics.jsonl")
    assert {r["attempt"] for r in records} == {1, 2}, "the history came back, too"
    records = [r for r in records if r["attempt"] == 2]
    uploads = {r["nimg"]: r["failed"] for r in records if r["kind"] == "upload"}
    assert uploads.keys() == {96, 128, LAST}
    assert not uploads[LAST]
    arrived = [80, *(nimg for nimg, failed in uploads.items() if not failed)]  # 128 gives way where the store is slow
    assert [nimg_of(name) for name in complete_names(store, CHECKPOINTS)] == arrived[-2:]
    assert len(complete_names(store, SNAPSHOTS)) == STEPS // 2
    sent = [r["failed"] for r in records if r["kind"] == "snapshot_upload"]
    assert len(sent) == STEPS // 2 - 5
    assert not any(sent)
    where = ["--endpoint-url", s3.endpoint_url]
    exported = tool("export.py", url, *where, "--out", str(tmp_path / "ema.safetensors"))
    assert exported.returncode == 0, exported.stderr
    weights = [path.read_bytes() for path in (tmp_path / "ema.safetensors", run / "weights" / "ema.safetensors")]
    assert weights[0] == weights[1]
    rebuilt = tool("ema.py", url, *where, "--length", "0.07", "--out", str(tmp_path))
    assert rebuilt.returncode == 0, rebuilt.stderr
    load_weights(tmp_path / f"ema_0.07_{LAST:012d}.safetensors")
    assert tool("export.py", url, *where).returncode == errors.ConfigError.exit_code


def test_a_store_that_is_away_at_the_end_is_told_and_the_same_command_sends(local_config, tmp_path):
    run = tmp_path / "run"
    with S3Server(tmp_path / "s3", "warm-dist") as server:
        port = int(server.endpoint_url.rpartition(":")[2])
        settings = ["checkpoint.url=s3://warm-dist/run", f"checkpoint.endpoint_url={server.endpoint_url}"]
        total = "train.total_nimg=1200"
        process = fork(local_config, run, *settings, total, "parallel.timeout_s=4",
                        "train.save_nimg=160", "train.snapshot_nimg=null", env=server.env)  # fmt: skip
        wait_for("some steps", lambda: reached(run) >= 240)
        process.send_signal(signal.SIGSTOP)
    at = reached(run)
    process.send_signal(signal.SIGCONT)
    code, _, err = finish(process)
    assert code == errors.UnreachableError.exit_code, err
    assert reached(run) == 1200 > at  # training did not care
    assert f"trained to nimg 1200, but checkpoints/{1200:012d} is not at s3://warm-dist/run" in err
    assert outcome(run)["resumable"]
    load_weights(run / "weights" / "ema.safetensors")
    with S3Server(tmp_path / "s3", "warm-dist", port) as server:
        code, _, err = finish(fork(local_config, run, *settings, total, "train.save_nimg=160",
                                   "train.snapshot_nimg=null", env=server.env))  # fmt: skip
        assert code == 0, err
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.env.items():
                patch.setenv(name, value)
            store = open_store("s3://warm-dist/run", server.endpoint_url)
        names = complete_names(store, CHECKPOINTS)
        assert nimg_of(names[-1]) == 1200
        exported = [tmp_path / f"{name}.safetensors" for name in "ab"]
        for place, path in zip((store, open_store(str(run))), exported, strict=True):
            saved = open_saved(place, names[-1])
            export_tensors([(saved, "master", 1.0)], tensors_of(run), path, {})
    assert exported[0].read_bytes() == exported[1].read_bytes()


def tensors_of(run: Path) -> list[Published]:
    return list(published(load_weights(run / "weights" / "ema.safetensors").network))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("NO SMALL FILE SYSTEM: mounting one needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(local_config, small_disk, tmp_path):
    run, whole = small_disk / "run", tmp_path / "whole"
    total = ["train.snapshot_nimg=null", "train.ema_lengths=[]"]
    codes, _, err = train(local_config, run, "engine=deepspeed", *total)
    assert codes == [errors.OutputError.exit_code] * 2, err
    assert outcome(run)["code"] == errors.OutputError.exit_code
    assert "bytes to write" in err
    names = complete_names(open_store(str(run)), CHECKPOINTS)
    assert names
    assert nimg_of(names[-1]) < LAST
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    for folder in (run, whole):
        codes, _, err = train(local_config, folder, "engine=deepspeed", *total)
        assert codes == [0, 0], err
    assert losses(run) == losses(whole)


def test_a_disk_that_is_full_in_mid_write_leaves_the_checkpoint_before(small_disk, monkeypatch):
    storage = CheckpointManager(small_disk, World(0, 1, torch.device("cpu"), None), CheckpointConfig(), print)
    meta = {"num_steps": 1, "config": {}, "data": {}, "fingerprint": "x"}
    storage.save(CHECKPOINTS, 8, {"master/w@0": torch.ones(800_000)}, meta)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    with pytest.raises(errors.OutputError, match="No space left on device"):
        storage.save(CHECKPOINTS, 16, {"master/w@0": torch.ones(800_000)}, meta)
    assert {path.name for path in small_disk.glob("checkpoints/*/*")} == {
        "rank_0.safetensors",
        "rank_0.done",
        "COMPLETE",
    }
    assert complete_names(storage.local, CHECKPOINTS) == [name_of(CHECKPOINTS, 8)]


def test_a_disk_that_is_full_while_packing_keeps_no_half_of_a_shard(small_disk, tmp_path):
    """Fault: what was written of the shard stays, under its own name or another."""
    source, out = noise_source(600, 64), small_disk / "data"
    with pytest.raises(errors.OutputError, match=r"No space left on device.*the same command goes on"):
        pack(source, str(out), shard_size=150)
    whole = pack(source, str(tmp_path / "whole"), shard_size=150)
    named = {shard.name: shard.size_bytes for shard in whole.shards}
    left = {path.name: path.stat().st_size for path in out.glob("*.*") if not path.name.startswith(".packing")}
    assert 0 < len(left) < len(named)
    assert left.items() < named.items()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    pack(source, str(out), shard_size=150)
    assert contents(out) == contents(tmp_path / "whole")


def test_prometheus_is_served_while_training(local_config, tmp_path):
    """Fault: no gauge for the age of the heartbeat or the checkpoint, or no speed in the heartbeat file."""
    port, run = free_port(), tmp_path / "run"
    process = fork(local_config, run, "train.total_nimg=8000000",
                    f"tracking.prometheus_port={port}", "train.snapshot_nimg=null")  # fmt: skip
    try:
        wait_for("some steps", lambda: reached(run) >= BATCH * 3)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        process.terminate()
        code, _, err = finish(process)
    assert code == errors.Stopped.exit_code, err
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["warm_dist_train_images_per_s"]) > 0
    assert float(values["warm_dist_heartbeat_age_s"]) == 0.0  # there is no other rank
    assert 0.0 < float(values["warm_dist_checkpoint_age_s"]) < 240.0
    beat = json.loads((run / "heartbeat" / "rank_0.json").read_text())
    assert beat["nimg"] >= BATCH * 3
    assert beat["facts"]["images_per_s"] > 0
