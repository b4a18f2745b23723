"""A RayJob's pods run for real: a head and a worker as KubeRay starts them, and the sweep submitted by its submitter's pod.

KubeRay writes its own commands (ray-operator/controllers/ray/common/pod.go and job.go, v1.7); all else is the manifest's.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.k8s.expand import expand
from tests.k8s.kubelet import Container, Kubelet
from tests.k8s.render import Object, render
from tests.k8s.test_pods import CONFIG, k8s
from tests.multinode.nodes import Cluster, need
from tests.processes import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HEAD = "sweep-head-svc.warm-dist.svc.cluster.local"
EVAL = {"eval_nimg": 160, "num_images": 16, "num_blocks": 1, "extractor": "pixels", "kid_images": 0, "grid": 2}
SWEEP = {
    "base": "digits.json",
    "set": {"engine": "local", "train.total_nimg": 320, "train.save_nimg": 160, "sampler.num_steps": 4},
    "output": "s3://warm-dist/sweep",
    "space": {"process.bnr": {"grid": [0]}},
    "trial": {"processes_per_node": 1, "cpus_per_process": 1},
}  # fmt: skip


class Outcome(NamedTuple):
    """What the submitter saw, and the table in the store."""

    code: int
    said: str
    refused: tuple[int, str]
    table: str


def ray_start(pod: Object, group: Object, *words: str) -> Object:
    """The container with KubeRay's command: `ray start` with the group's rayStartParams."""
    container: Object = copy.deepcopy(pod["spec"]["containers"][0])
    flags = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
    line = " ".join(["ulimit -n 65536; ray start", *words, "--block", "--metrics-export-port=8080", *flags])
    return container | {"command": ["/bin/bash", "-c", "--"], "args": [line]}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    need()
    config = tmp_path_factory.mktemp("sweep")
    (config / "digits.json").write_text(json.dumps(CONFIG | {"eval": EVAL}))
    (config / "sweep.json").write_text(json.dumps(SWEEP))
    objects = render(ROOT / "k8s" / "overlays" / "dev")
    objects += k8s("pack", "--nodes", "1", "--", "digits", "s3://warm-dist/digits8", "--resolution", "8")
    rendered = k8s("render", "--config", str(config / "sweep.json"), "--nodes", "1", "--processes", "2")
    objects += rendered
    pods = {pod["metadata"]["name"]: pod for pod in expand(objects)}
    known = {
        "s3-credentials": {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)},
        "ray-token": {"auth_token": secrets.token_hex(32)},
        "mlflow-database": {"uri": "sqlite:////scratch/mlflow.db"},  # PostgreSQL is test_tracking's
    }
    hosts = {"s3": "10.77.0.3", "mlflow": "10.77.0.3", HEAD: "10.77.0.1"}
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as folder,  # short, for Ray's sockets
        Cluster(3, Path(folder) / "c") as cluster,
        Kubelet(cluster, Path(folder), objects, known, hosts) as kubelet,
    ):
        yield sweep(kubelet, pods, rendered[-1])


def sweep(kubelet: Kubelet, pods: dict[str, Object], job: Object) -> Outcome:
    """Packs, starts Ray, submits, and reads what came of it."""
    kubelet.start(pods["s3-0"], "node3")
    mlflow = kubelet.start(pods["mlflow-0"], "node3")
    pack = kubelet.start(pods["pack-digits8-whole-0-0"], "node1")
    assert pack.wait(120) == 0, pack.said()
    cluster = job["spec"]["rayClusterSpec"]
    head, worker = pods["sweep-head"], pods["sweep-trials-worker-0"]
    ray = [
        kubelet.start(head, "node1", 0, ray_start(head, cluster["headGroupSpec"], "--head")),
        kubelet.start(worker, "node2", 0, ray_start(worker, cluster["workerGroupSpecs"][0], f"--address={HEAD}:6379")),
    ]
    for container in ray:
        container.until("--block")
    mlflow.until("Application startup complete")
    refused = submit(kubelet, pods["sweep-submitter"], "ray job list", 1, {"RAY_AUTH_TOKEN": "0" * 64})
    done = submit(
        kubelet, pods["sweep-submitter"], f"ray job submit --submission-id sweep-1 -- {job['spec']['entrypoint']}", 2
    )
    code = done.wait(200)
    assert code == 0, "\n".join([done.said(), *(container.said() for container in ray)])
    table = kubelet.start(pods["sweep-submitter"], "node1", 3, reader(pods["pack-digits8-whole-0-0"]))
    assert table.wait(60) == 0, table.said()
    return Outcome(code, done.said(), (refused.wait(60), refused.said()), table.said())


def submit(kubelet: Kubelet, pod: Object, line: str, attempt: int, env: dict[str, str] | None = None) -> Container:
    """A ray command in the submitter's pod, with the address that KubeRay gives it."""
    container: Object = copy.deepcopy(pod["spec"]["containers"][0])
    container["env"] += [{"name": "RAY_ADDRESS", "value": f"http://{HEAD}:8265"}]
    container["env"] += [{"name": name, "value": value} for name, value in (env or {}).items()]
    return kubelet.start(pod, "node1", attempt, container | {"command": ["/bin/bash", "-c", line], "args": []})


def reader(pod: Object) -> Object:
    """A container that prints the sweep's table."""
    code = "from data_pipelines.store import open_store; print(open_store('s3://warm-dist/sweep', None).read('results/table.txt').decode())"
    return pod["spec"]["containers"][0] | {"command": ["python", "-c", code], "args": []}


def test_the_sweep_runs_on_the_worker_and_its_results_are_in_the_store(outcome):
    assert outcome.code == 0
    assert "ray: joined" in outcome.said
    assert "ray: a trial takes 1 CPU on 1 of 2 machines, the largest with 2 CPU and 0 GPU" in outcome.said
    assert re.search(r"^ +1 +0 +finished +320 ", outcome.table, re.M), outcome.table


def test_ray_refuses_another_token(outcome):
    code, said = outcome.refused
    assert code != 0
    assert "token" in said.lower()
