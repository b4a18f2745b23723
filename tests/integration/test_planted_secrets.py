"""Planted secrets: a training and the commands on its run tell none, in files, stores, servers, texts or command lines.

Those of a sweep and of every launcher are in test_let_in_nobody.py, the quickstart's in test_quickstart.py, what is
rendered for Kubernetes in tests/k8s/test_values.py.
"""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest

from launch.services import BUCKET, Services
from tests.support.planted import Planted
from tests.support.processes import MARK, ROOT, end_marked, free_port, wait_for
from tests.support.training import environment, finish, fork, outcome
from tests.support.watch import Watch, telling
from tests.support.zygote import zygote
from warm_dist.errors import UnreachableError
from warm_dist.store.s3 import S3Store
from warm_dist.store.seaweedfs import S3Server

COPY = "s3://warm-dist/planted"


class Trained(NamedTuple):
    """A finished run, in a folder of its own, and what its processes told meanwhile. planted: also its S3's keys."""

    folder: Path
    planted: Planted
    env: dict[str, str]
    told: set[str]
    said: str

    @property
    def run(self) -> Path:
        return self.folder / "run"


def scraped(url: str) -> str:
    with suppress(OSError), urllib.request.urlopen(url, timeout=2) as reply:
        return str(reply.read().decode())
    return ""


@pytest.fixture(scope="module")
def trained(config_file: Path, s3: S3Server, running: Services, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """By launch/node.py: torchrun, its rank, uploads to S3, an evaluation, Prometheus, the mirror and its model."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "tmp").mkdir()
    planted = Planted(
        tmp_path_factory.mktemp("home"), "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"
    )
    planted.secrets += [s3.env["AWS_ACCESS_KEY_ID"], s3.env["AWS_SECRET_ACCESS_KEY"]]
    pet = {"NNODES": "1", "NPROC_PER_NODE": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    pet["MASTER_PORT"], metrics = str(free_port()), free_port()
    env = environment() | planted.env | {f"PET_{name}": value for name, value in pet.items()}
    env |= {"TMPDIR": str(folder / "tmp"), MARK: uuid4().hex}
    overrides = (
        f"output={folder / 'run'}",
        "engine=local",
        f"checkpoint.url={COPY}",
        f"checkpoint.endpoint_url={s3.endpoint_url}",
        f"tracking.mlflow_url={running.mlflow_url}",
        "tracking.experiment=planted",
        "tracking.log_model=true",
        f"tracking.prometheus_port={metrics}",
        'eval={"eval_nimg": 160, "num_images": 64, "extractor": "pixels", "kid_images": 0, "cache_dir": null}',
        "sampler.num_steps=3",
    )
    words = [str(ROOT / "launch" / "node.py"), "--config", str(config_file), *(f"--set={item}" for item in overrides)]
    process = subprocess.Popen(
        [sys.executable, *words],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    pages: list[str] = []
    with Watch(env[MARK], planted.secrets, folder) as watch:
        url = f"http://127.0.0.1:{metrics}/metrics"
        wait_for("Prometheus", lambda: bool(pages.append(scraped(url)) or pages[-1]) or process.poll() is not None)
        code, said, _ = finish(process)
    end_marked(env[MARK])
    assert code == 0, said
    assert "warm_dist" in pages[-1]
    return Trained(folder, planted, env, watch.told - {str(planted.file)}, said + pages[-1])


def kept(store: S3Store) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.list("")}


def test_a_training_tells_no_secret(trained, s3):
    assert trained.told == set()
    assert telling(trained.folder.rglob("*"), trained.planted.secrets) == set()
    assert trained.planted.told(trained.said) == []
    keys = (s3.env["AWS_ACCESS_KEY_ID"], s3.env["AWS_SECRET_ACCESS_KEY"])
    copies = kept(S3Store("warm-dist", "planted", s3.endpoint_url, keys))
    assert any(name.endswith("COMPLETE") for name in copies)
    assert trained.planted.told(*copies, *copies.values()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("mirror.py", "{run}"),
        ("evaluate.py", "{run}", "--nfe=3", "--num-images=64", "--blocks=1", "--out={out}"),
        ("export.py", COPY, "--endpoint-url={s3}", "--out={out}/weights.safetensors"),
        ("sample.py", "--weights={run}/weights/ema.safetensors", "--n=4", "--nfe=3", "--out={out}/samples.png"),
        ("report.py", "{run}", "--out={out}/report.html"),
    ],
    ids=lambda words: words[0],
)
def test_a_command_on_it_tells_no_secret(trained, s3, words, tmp_path):
    command, *rest = (word.format(run=trained.run, out=tmp_path, s3=s3.endpoint_url) for word in words)
    if command == "mirror.py":
        (trained.run / "mirror.json").unlink()  # everything is sent once more
    done = zygote().run(ROOT / "launch" / command, *rest, env=trained.env)
    assert done.returncode == 0, done.stderr
    assert trained.planted.told(done.stdout, done.stderr) == []
    assert telling([*trained.folder.rglob("*"), *tmp_path.rglob("*")], trained.planted.secrets) == set()


def test_mlflow_and_its_artifacts_hold_no_secret(trained, running):
    keys = (running.s3.env["AWS_ACCESS_KEY_ID"], running.s3.env["AWS_SECRET_ACCESS_KEY"])
    artifacts = kept(S3Store(BUCKET, "mlflow", running.s3.endpoint_url, keys))
    assert any("MLmodel" in name for name in artifacts)
    assert trained.planted.told(*artifacts, *artifacts.values()) == []
    assert telling(running.s3.directory.parent.glob("mlflow.*"), trained.planted.secrets) == set()


def test_a_proxy_that_does_not_answer_is_named_without_its_password(trained, config_file, tmp_path):
    run = tmp_path / "run"
    process = fork(config_file, run, "engine=local", "data.endpoint_url=http://s3.example:1", env=trained.env)
    code, out, err = finish(process)
    assert (code, outcome(run)["code"]) == (UnreachableError.exit_code, UnreachableError.exit_code), err
    assert "s3.example:1 does not answer (ProxyConnectionError)" in err
    assert trained.planted.told(out, err) == []
    assert telling(run.rglob("*"), trained.planted.secrets) == set()
