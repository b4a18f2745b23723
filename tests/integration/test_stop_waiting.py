"""A stop while a peer or a server is waited for: heeded within seconds with 75, and exit.json tells what is saved."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty_proxy import FaultyProxy
from tests.support.packed import Packed
from tests.support.processes import free_port, wait_for
from tests.support.training import BATCH, ENDLESS, digits_config, finish, fork, fork_ranks, outcome, reached
from tests.support.zygote import Forked
from warm_dist.runs.metrics import read_metrics

HEEDED_S = 5.0
SLACK_S = 2.0  # for a busy machine, on which the test has many processes
AHEAD = ("data.buffer_bytes=4000", "data.window=16", "data.chunk=8")
SETTINGS = ("engine=local", "train.save_nimg=8000000", ENDLESS)  # every save is a stop's


def handles(pid: int, number: int) -> bool:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def stopped(process: Forked, run: Path, number: signal.Signals = signal.SIGTERM) -> tuple[dict[str, Any], str]:
    """Send the signal; exit.json and stderr of what has then ended in time with 75."""
    begun = time.monotonic()
    process.send_signal(number)
    code, _, err = finish(process)
    took_s = time.monotonic() - begun
    told = outcome(run)
    print(f"{took_s:.1f} s: {told}")
    assert (code, told["code"], told["resumable"]) == (75, 75, True), err
    assert told["reason"].startswith(f"Stopped: {number.name} on host "), told
    assert took_s < HEEDED_S + SLACK_S
    return told, err


def joining(process: Forked) -> None:
    wait_for("its handlers", lambda: handles(process.pid, signal.SIGUSR1))  # set before it joins
    time.sleep(1)


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_for_a_peer_that_never_comes(tmp_path: Path, digits: Packed, rank: int, number: signal.Signals) -> None:
    """Fault: nothing for the 180 s that peers may take, then "could not join" with 11; no exit.json, or that of an earlier attempt."""
    env, run = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}, tmp_path / "run"
    run.mkdir()
    (run / "exit.json").write_text("an earlier end")
    process = fork(digits_config(tmp_path, digits), run, "engine=local", env=env)
    joining(process)
    told, err = stopped(process, run, number)
    assert "while waiting for its peers; run the same command again" in told["reason"]
    assert f"Stopped: {number.name} on host " in err


def test_for_a_manifest(tmp_path: Path, digits: Packed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"data.endpoint_url=http://127.0.0.1:{silent.getsockname()[1]}"
        process = fork(digits_config(tmp_path, digits), tmp_path / "run", *SETTINGS, url)
        joining(process)
        told, _ = stopped(process, tmp_path / "run")
    assert "while opening the data; there is nothing new to save; run the same command again" in told["reason"]


def hungry(proxy: FaultyProxy) -> tuple[str, ...]:
    """Settings with which few images are read ahead, through the proxy."""
    return (*SETTINGS, f"data.endpoint_url={proxy.url}", *AHEAD)


def begun(run: Path, lines: int = 3) -> bool:
    return len([line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]) >= lines


def test_for_a_batch_one_rank_saves(tmp_path: Path, digits: Packed) -> None:
    """Fault: the read's patience of 45 s, more than launchers grant, and then nothing is saved."""
    run, config = tmp_path / "run", digits_config(tmp_path, digits)
    with FaultyProxy(str(digits.endpoint_url)) as proxy:
        process = fork(config, run, *hungry(proxy))
        wait_for("some steps", lambda: begun(run))
        proxy.silent.set()
        time.sleep(2)
        told, _ = stopped(process, run)
    nimg = told["nimg"]
    assert nimg == reached(run) > 0
    assert f"while waiting for its batch at nimg {nimg}; saved at nimg {nimg}; run" in told["reason"]
    assert (run / "checkpoints" / f"{nimg:012d}" / "COMPLETE").exists()
    more = f"train.total_nimg={nimg + 2 * BATCH}"
    code, out, err = finish(fork(config, run, *SETTINGS[:2], *AHEAD, more))
    assert (code, f"resumed at nimg {nimg}" in out) == (0, True), err


def test_for_a_batch_of_two_ranks(tmp_path: Path, digits: Packed) -> None:
    """One rank is asked to stop, and no rank gets its batch: they cannot save in the midst of a step, and say so."""
    run = tmp_path / "run"
    with FaultyProxy(str(digits.endpoint_url)) as proxy:
        ranks = fork_ranks(digits_config(tmp_path, digits), run, *hungry(proxy))
        wait_for("some steps", lambda: begun(run))
        proxy.silent.set()
        time.sleep(2)
        told, _ = stopped(ranks[1], run)
        ranks[0].terminate()  # as a launcher does
        assert finish(ranks[0])[0] == 75
    assert f"nimg {told['nimg']} is not saved, nor is anything before it" in told["reason"]


@pytest.mark.parametrize("hung", [0, 1])
def test_for_a_rank_that_hangs(tmp_path: Path, digits: Packed, hung: int) -> None:
    """Inside torch no signal is handled, so another thread ends the process. Rank 0 holds the ranks' store."""
    run = tmp_path / "run"
    ranks = fork_ranks(digits_config(tmp_path, digits), run, *SETTINGS)
    wait_for("some steps", lambda: begun(run))
    os.kill(ranks[hung].pid, signal.SIGSTOP)
    told, err = stopped(ranks[1 - hung], run)
    assert f"while waiting for rank {hung} (host " in told["reason"]
    assert "is not saved" in told["reason"]
    assert err.count("Stopped: SIGTERM on host ") == 1
    ranks[hung].kill()
    finish(ranks[hung])


def test_for_the_last_upload(tmp_path: Path, digits: Packed) -> None:
    run, total = tmp_path / "run", 100 * BATCH
    with FaultyProxy(str(digits.endpoint_url)) as proxy:
        place = ["checkpoint.url=s3://warm-dist/stop-upload", f"checkpoint.endpoint_url={proxy.url}"]
        process = fork(digits_config(tmp_path, digits), run, *SETTINGS[:2], f"train.total_nimg={total}", *place)
        wait_for("a step", lambda: begun(run, 1))
        proxy.silent.set()
        wait_for("the last checkpoint", (run / "checkpoints" / f"{total:012d}" / "COMPLETE").exists)
        time.sleep(1)
        told, _ = stopped(process, run)
    assert (told["nimg"], "while sending the last checkpoint; saved at nimg" in told["reason"]) == (total, True), told
    assert f"checkpoints/{total:012d} not yet at s3://warm-dist/stop-upload" in told["reason"]
