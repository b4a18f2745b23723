"""What listens and what is told: no launcher, sweep or evaluation opens a port to other machines or writes a secret down.

The quickstart's and `make ui`'s ports are in test_quickstart.py, the embedded S3's in test_seaweedfs.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.planted import Planted
from tests.support.processes import MARK, ROOT, end_marked, free_port, wait_for
from tests.support.sweeps import EVERY, Command, pack_digits, write_sweep
from tests.support.training import BATCH, ENDLESS, environment, finish, launcher, reached, start
from tests.support.watch import Watch, telling

OURS = [sys.executable, "-m", "warm_dist.distributed.torchrun", "--nproc-per-node=2"]


def watched(command: list[str], config: Path, run: Path, planted: Planted) -> tuple[set[str], str]:
    """The addresses on which a training listens up to its second step, and what it said on stderr, where no secret is told."""
    mark = uuid4().hex
    process = start(command, config, run, ENDLESS, env={MARK: mark, **planted.env})
    with Watch(mark, planted.secrets) as watch:
        wait_for("steps", lambda: reached(run) >= 2 * BATCH or process.poll() is not None, 120)
    end_marked(mark)
    _, out, err = finish(process)
    assert watch.told - {str(planted.file)} | telling(run.rglob("*"), planted.secrets) == set()
    assert planted.told(out, err) == []
    return watch.addresses, err


@pytest.fixture
def planted(s3, tmp_path):
    """With the credentials of the S3 that has the data."""
    made = Planted(tmp_path, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    made.secrets += [s3.env["AWS_ACCESS_KEY_ID"], s3.env["AWS_SECRET_ACCESS_KEY"]]
    return made


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)  # set by a `join` in this process


@pytest.mark.parametrize(
    "command",
    [
        launcher("python"),
        launcher("deepspeed"),
        [*OURS, "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"],
    ],
    ids=["python", "deepspeed", "torchrun"],
)
def test_a_launcher_on_one_machine_listens_on_loopback_alone(command, config_file, tmp_path, planted):
    """Fault: torchrun's store, which holds ours, can be read and changed by whoever reaches the machine."""
    addresses, said = watched(command, config_file, tmp_path / "run", planted)
    assert addresses == {"127.0.0.1"}, said


def test_a_pod_listens_on_the_address_that_its_peers_are_told(config_file, tmp_path):
    pet = {"NNODES": "1", "NPROC_PER_NODE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.3"}
    env = {f"PET_{name}": value for name, value in {**pet, "MASTER_PORT": str(free_port())}.items()}
    mark, run = uuid4().hex, tmp_path / "run"
    words = [str(ROOT / "launch" / "node.py"), "--config", str(config_file), f"--set=output={run}", f"--set={ENDLESS}"]
    process = subprocess.Popen([sys.executable, *words, "--set=engine=local"], env={**environment(), **env, MARK: mark})
    with Watch(mark) as watch:
        wait_for("steps", lambda: reached(run) >= 2 * BATCH or process.poll() is not None, 120)
    end_marked(mark)
    process.wait(30)
    assert "127.0.0.3" in watch.addresses
    assert watch.addresses <= {"127.0.0.1", "127.0.0.3"}


def test_a_run_under_torchrun_itself_says_that_it_is_open(config_file, tmp_path, planted):
    addresses, said = watched(launcher("torchrun"), config_file, tmp_path / "run", planted)
    assert "torchrun listens on every address of this machine" in said
    assert "::" in addresses or "0.0.0.0" in addresses  # once this fails, torch can do without ours


def test_a_sweep_with_its_evaluation_listens_on_loopback_and_tells_no_secret(tmp_path, tmp_path_factory, monkeypatch):
    """Fault: Tune passes AWS's keys through Ray, whose log of 0644 keeps them; Ray's folder is open to everyone."""
    planted = Planted(tmp_path_factory.mktemp("home"))
    for name, value in planted.env.items():
        monkeypatch.setenv(name, value)
    short, surface = {"train.total_nimg": EVERY}, {"nfe": [3], "num_images": 64}
    config = write_sweep(tmp_path, pack_digits(tmp_path), {}, short, trial={"processes_per_node": 2}, surface=surface)
    before = set(Path("/tmp").glob("ray-*"))
    sweep = Command(config)
    with Watch(sweep.mark, planted.secrets) as watch:
        wait_for("Ray's folder", lambda: set(Path("/tmp").glob("ray-*")) > before or sweep.process.poll() is not None)
        modes = {oct(folder.stat().st_mode & 0o777) for folder in set(Path("/tmp").glob("ray-*")) - before}
        code, said = sweep.end()
    assert code == 0, said
    assert watch.addresses == {"127.0.0.1"}
    assert watch.told - {str(planted.file)} == set()
    assert telling(tmp_path.rglob("*"), planted.secrets) == set()
    assert planted.told(said) == []
    assert modes == {"0o700"}
