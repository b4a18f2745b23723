"""launch/node.py on one node: its exit code is the run's, whatever torchrun makes of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import free_port, wait_for
from tests.support.training import BATCH, ENDLESS, environment, finish, outcome, reached
from tests.support.zygote import Forked, zygote
from warm_dist import errors


def node(config: Path, run: Path, *overrides: str) -> Forked:
    """As a fork; torchrun and its rank are started by it."""
    pet = {"NNODES": "1", "NPROC_PER_NODE": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env = {f"PET_{name}": value for name, value in {**pet, "MASTER_PORT": str(free_port())}.items()}
    sets = [f"--set={item}" for item in (f"output={run}", "engine=local", *overrides)]
    script = str(ROOT / "launch" / "node.py")
    return zygote().start(script, "--config", str(config), *sets, env=environment() | env)


def test_sigterm_to_it_alone_stops_and_saves(config_file, tmp_path):
    process = node(config_file, tmp_path / "run", ENDLESS)
    wait_for("steps", lambda: reached(tmp_path / "run") >= 2 * BATCH or process.poll() is not None, 120)
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = finish(process)
    assert code == errors.Stopped.exit_code, err
    assert outcome(tmp_path / "run")["resumable"]
    assert err.splitlines()[-1].startswith("node: Stopped: SIGTERM on rank 0 (host ")


def test_the_run_s_own_code_and_words_come_last(config_file, tmp_path):
    process = node(config_file, tmp_path / "run", "data.manifest=s3://warm-dist/nothing/manifest.parquet")
    code, _, err = finish(process)
    assert code == errors.DataError.exit_code, err
    assert err.splitlines()[-1] == "node: DataError: s3://warm-dist/nothing/manifest.parquet: does not exist"


def test_an_end_of_an_earlier_attempt_is_not_told_again(config_file, tmp_path):
    (tmp_path / "run").mkdir()
    old = tmp_path / "run" / "exit.json"
    old.write_text('{"code": 75, "reason": "Stopped: long ago", "nimg": 0, "resumable": true, "attempt": 1}')
    os.utime(old, (1.0, 1.0))
    process = node(config_file, tmp_path / "run", "data.num_lanes=5")
    code, _, err = finish(process)
    assert code == errors.ConfigError.exit_code, err  # said before torchrun is started
    assert "long ago" not in err
    process = node(config_file, tmp_path / "run", "train.micro_batch_size=7")
    code, _, err = finish(process)
    assert code == errors.EXIT_UNEXPECTED, err  # refused before the folder is claimed: torchrun's own
    assert "long ago" not in err


@pytest.mark.parametrize("asked", ["at once", "later"])
def test_a_finished_run_waits_for_its_mirror_until_a_stop_is_requested(config_file, tmp_path, asked):
    """Fault: a request made while torchrun was still ending is taken for an old one, and the pod stays ten minutes."""
    run, stop = tmp_path / "run", tmp_path / "stop"
    with socket.create_server(("127.0.0.1", 0)) as hangs:  # it takes connections and says nothing
        url = f"http://127.0.0.1:{hangs.getsockname()[1]}"
        process = node(config_file, run, f"tracking.mlflow_url={url}", f"parallel.preemption_file={stop}")
        wait_for("the end", lambda: (run / "exit.json").exists() or process.poll() is not None, 120)
        if asked == "later":
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(5)
        stop.touch()
        code, _, err = finish(process)
    assert code == 0, err
    assert outcome(run)["code"] == 0
