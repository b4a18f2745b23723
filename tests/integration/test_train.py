"""launch/train.py for real: by each launcher once; then as forks: kills, evaluation and bad input."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.support.paths import ROOT
from tests.support.processes import wait_for
from tests.support.training import (
    BATCH,
    ENDLESS,
    STEPS,
    finish,
    fork,
    fork_ranks,
    launcher,
    losses,
    outcome,
    reached,
    start,
)
from tests.support.zygote import zygote
from warm_dist import errors
from warm_dist.runs.metrics import read_metrics


@pytest.fixture(scope="module")
def reference(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Plain python, LocalEngine, one process: 20 losses."""
    run = tmp_path_factory.mktemp("reference") / "run"
    code, out, err = finish(start(launcher("python"), config_file, run, "engine=local"))
    assert code == 0, err
    assert "Warning" not in err
    assert f"nimg {BATCH * STEPS}/{BATCH * STEPS}" in out
    assert outcome(run) == {"code": 0, "reason": "finished", "nimg": BATCH * STEPS, "resumable": False, "attempt": 1}
    return losses(run)


def agree(found: list[float], reference: list[float]) -> None:
    assert len(found) == len(reference) == STEPS
    assert max(abs(a - b) / b for a, b in zip(found, reference, strict=True)) < 5e-6


def test_deepspeed_on_two_ranks_equals_local_on_one(config_file, reference, tmp_path):
    # every stage: test_engines.py, where one set of processes serves them all, and below in the soak
    code, _, err = finish(start(launcher("deepspeed"), config_file, tmp_path / "run", "parallel.zero_stage=2"))
    assert code == 0, err
    agree(losses(tmp_path / "run"), reference)


@pytest.mark.soak
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_deepspeed_at_every_stage_equals_local_on_one(config_file, reference, tmp_path, stage):
    code, _, err = finish(start(launcher("deepspeed"), config_file, tmp_path / "run", f"parallel.zero_stage={stage}"))
    assert code == 0, err
    agree(losses(tmp_path / "run"), reference)


def test_torchrun_on_two_ranks_equals_local_on_one(config_file, reference, tmp_path):
    code, _, err = finish(start(launcher("torchrun"), config_file, tmp_path / "run", "engine=local"))
    assert code == 0, err
    agree(losses(tmp_path / "run"), reference)


def test_sigterm_and_kill_9_then_the_same_command_goes_on(config_file, tmp_path):
    """Stopped by SIGTERM, then killed with -9, then finished: bit-equal to an unbroken run."""
    run, whole, dropout = tmp_path / "broken", tmp_path / "whole", "network.dropout=0.1"
    pair = fork_ranks(config_file, run, ENDLESS, dropout)
    wait_for("some steps", lambda: reached(run) >= BATCH * 6)
    for process in pair:
        process.terminate()
    assert [finish(process)[0] for process in pair] == [errors.Stopped.exit_code] * 2
    told = outcome(run)
    assert (told["code"], told["resumable"]) == (errors.Stopped.exit_code, True)
    assert "SIGTERM" in told["reason"]

    stopped_at = reached(run)
    pair = fork_ranks(config_file, run, ENDLESS, dropout)
    wait_for("more steps", lambda: reached(run) >= stopped_at + BATCH * 6)
    for process in pair:
        process.kill()
    for process in pair:
        finish(process)
    assert not (run / "exit.json").exists()

    total = f"train.total_nimg={(reached(run) // BATCH + 6) * BATCH}"
    ends = [[finish(process) for process in fork_ranks(config_file, folder, total, dropout)] for folder in (run, whole)]
    assert [code for end in ends for code, _, _ in end] == [0, 0, 0, 0], ends
    assert "resumed at nimg" in ends[0][0][1]
    assert losses(run) == losses(whole)
    weights = [(folder / "weights" / "ema.safetensors").read_bytes() for folder in (run, whole)]
    data = [blob[8 + int.from_bytes(blob[:8], "little") :] for blob in weights]  # the header names the output folder
    assert data[0] == data[1]


def test_evaluation_pictures_and_weights(config_file, tmp_path):
    """Fault: the first or last evaluation left out, --label ignored, or an export of other weights."""
    run = tmp_path / "run"
    settings = [
        "eval.eval_nimg=160",
        "eval.num_images=64",
        "eval.extractor=pixels",
        "eval.grid=4",
        "sampler.num_steps=3",
    ]
    code, out, err = finish(fork(config_file, run, *settings))
    assert code == 0, err
    evaluations = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "eval"]
    assert [r["nimg"] for r in evaluations] == [0, 160]
    assert evaluations[0]["spec"] == evaluations[1]["spec"]
    assert 0 < evaluations[0]["floor"] < evaluations[0]["frechet"]
    assert "Fréchet distance (pixels)" in out
    assert (run / evaluations[1]["grid"]).read_bytes().startswith(b"\x89PNG")
    weights, launch = run / "weights" / "ema.safetensors", ROOT / "launch"
    sample = [str(launch / "sample.py"), f"--weights={weights}", "--n=3", "--nfe=5", "--bnr=0.5", "--seed=3"]
    commands = [
        [*sample, f"--out={tmp_path / 'a.npy'}"],
        [*sample, "--label=7", f"--out={tmp_path / 'b.npy'}"],
        [str(launch / "export.py"), str(run), f"--out={tmp_path / 'again.safetensors'}"],
    ]
    assert [finish(zygote().start(*command))[0] for command in commands] == [0, 0, 0]
    drawn, sevens = (np.load(tmp_path / name).astype(int) for name in ("a.npy", "b.npy"))
    assert drawn.shape == sevens.shape == (3, 1, 8, 8)
    assert (drawn != sevens).any()
    assert (tmp_path / "again.safetensors").read_bytes() == weights.read_bytes()


BAD = {
    "misspelt key": ({}, ["train.batchsize=8"], errors.ConfigError, "did you mean 'train.batch_size'"),
    "placeholder bucket": (
        {},
        ["data.manifest=s3://your-bucket/a/manifest.parquet"],
        errors.ConfigError,
        "set data.manifest",
    ),
    "missing bucket": ({}, ["data.manifest=s3://absent/a/manifest.parquet"], errors.BucketError, "absent"),
    "wrong S3 key": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, [], errors.AccessError, "refuse"),
    "missing manifest": ({}, ["data.manifest=s3://warm-dist/none/manifest.parquet"], errors.DataError, "none"),
    "S3 down": ({}, ["data.endpoint_url=http://127.0.0.1:1"], errors.UnreachableError, "127.0.0.1:1"),
    "wrong resolution": (
        {},
        ["data.resolution=16", "network.attention_resolutions=[8]"],
        errors.ConfigError,
        "data.resolution",
    ),
    "unwritable output": ({}, ["output=/proc/run"], errors.OutputError, "/proc/run"),
    "illegal world size": (
        {"WORLD_SIZE": "3", "RANK": "0"},
        [],
        errors.WorldSizeError,
        "valid world sizes: 1, 2, 4, 8",
    ),
}


@pytest.fixture(scope="module")
def refusals(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, str]]:
    """All bad inputs at once: the run's folder, exit code and stderr of each."""
    root = tmp_path_factory.mktemp("bad")
    started = {
        case: fork(config_file, root / case, "engine=local", *overrides, env=env)
        for case, (env, overrides, _, _) in BAD.items()
    }
    ended = {case: finish(process) for case, process in started.items()}
    return {case: (root / case, code, err) for case, (code, _, err) in ended.items()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_with_its_own_code(refusals, case):
    _, _, error, words = BAD[case]
    run, code, err = refusals[case]
    assert code == error.exit_code, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"{error.__name__}: ")
    assert words in lines[0]
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in err
    assert not (run / "checkpoints").exists()
    if run.exists():
        assert outcome(run)["code"] == code


def test_port_in_use(config_file, tmp_path):
    """Fault: a rendezvous port in use that ends in a traceback, or in a timeout three minutes later."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        code, _, err = finish(fork(config_file, tmp_path / "run", env=env))
    assert code == errors.PortError.exit_code
    assert err.startswith(f"PortError: 127.0.0.1:{env['MASTER_PORT']} cannot be bound")
    assert len(err.splitlines()) == 1


def test_an_undecodable_image_ends_training_with_its_key(s3, digits, config_file, tmp_path):
    """A shard's bytes change after packing: the crc of one image, seen by one of two ranks, ends both with its key."""
    from warm_dist.store.open import open_store

    store = open_store(digits.url, digits.endpoint_url)
    copy = open_store("s3://warm-dist/damaged", digits.endpoint_url)
    for name in store.list():
        copy.write(name, store.read(name))
    row = 700
    shard = digits.manifest.shards[int(digits.manifest.shard[row])].name
    blob = bytearray(copy.read(shard))
    blob[int(digits.manifest.offset[row]) + 140] ^= 0xFF
    copy.write(shard, bytes(blob))
    run = tmp_path / "run"
    settings = ["data.manifest=s3://warm-dist/damaged/manifest.parquet", "train.total_nimg=2000"]
    ends = [finish(process) for process in fork_ranks(config_file, run, *settings)]
    assert [code for code, _, _ in ends] == [errors.DataError.exit_code] * 2, ends
    assert outcome(run)["code"] == errors.DataError.exit_code
    key = digits.manifest.key[row]
    assert str(key) in outcome(run)["reason"]
    assert [err.count("DataError: ") for _, _, err in ends] == [1, 0]  # rank 0 alone tells it
    assert "Traceback" not in ends[0][2] + ends[1][2]


def test_a_second_run_in_the_same_folder_is_refused(config_file, tmp_path):
    first = fork(config_file, tmp_path / "run", "engine=local", ENDLESS)
    try:
        wait_for("a step", lambda: reached(tmp_path / "run") >= BATCH)
        code, _, err = finish(fork(config_file, tmp_path / "run", "engine=local"))
        assert code == errors.OutputError.exit_code
        assert "another training process is using it" in err
    finally:
        first.send_signal(signal.SIGINT)
        code, _, err = finish(first)
    assert code == errors.Stopped.exit_code
    assert err.count("Stopped: SIGINT") == 1


def test_a_finished_run_is_not_trained_again_nor_mixed_with_another(config_file, tmp_path):
    run = tmp_path / "run"
    for attempt in (1, 2):
        code, out, err = finish(fork(config_file, run, "engine=local", "train.total_nimg=32"))
        assert code == 0, err
        assert outcome(run)["attempt"] == attempt
    assert out.count("nimg 32/32") == 0
    assert len(losses(run)) == 4
    code, _, err = finish(fork(config_file, run, "engine=local", "network.channels=8"))
    assert code == errors.CheckpointError.exit_code
    assert "network" in err
