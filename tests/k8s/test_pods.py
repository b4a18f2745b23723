"""The dev overlay's own commands, run for real: S3, MLflow, packing in parts, a training of two nodes with a drain and
restarts, a sweep on Ray.

Two machines and a server are network namespaces; the pods are those that the controllers would make of the manifests
(tests/k8s/expand.py), with their uid, environment, volumes and read-only root (tests/k8s/kubelet.py). KubeRay writes its own
commands (ray-operator/controllers/ray/common/pod.go and job.go, v1.7).
"""

from __future__ import annotations

import json
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

import pytest

from tests.k8s.failures import FREE, jobsets, outcome
from tests.k8s.kubelet import Container, Kubelet
from tests.k8s.render import OVERLAYS, Object, launched, render
from tests.k8s.world import World
from tests.multinode.nodes import Cluster, need
from tests.support.processes import wait_for
from warm_dist.files import read_json
from warm_dist.runs.metrics import parse_line

pytestmark = pytest.mark.timeout(600)
BATCH, TOTAL, DRAINED_AT, STOPPED_AT = 16, 640, 160, 320
CONFIG = {
    "output": "unset",
    "data": {"manifest": "s3://warm-dist/digits8/manifest.parquet", "resolution": 8, "channels": 1, "num_classes": 10,
             "num_lanes": 8, "chunk": 16},
    "process": {"bnr": 0.5},
    "network": {"arch": "ddpmpp", "channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [4]},
    "train": {"total_nimg": TOTAL, "batch_size": BATCH, "lr": 1e-3, "clip": 1.0, "ema_half_life_nimg": 100,
              "log_nimg": BATCH, "save_nimg": 320},
    "checkpoint": {"url": "s3://warm-dist/runs/digits"},
    "tracking": {"log_model": False},
}  # fmt: skip
EVAL = {"eval_nimg": 160, "num_images": 16, "num_blocks": 1, "extractor": "pixels", "kid_images": 0, "grid": 2}
SWEEP = {
    "base": "evaluated.json",
    "set": {"engine": "local", "train.total_nimg": 320, "train.save_nimg": 160, "sampler.num_steps": 4},
    "output": "s3://warm-dist/sweep",
    "space": {"process.bnr": {"grid": [0]}},
    "trial": {"processes_per_node": 1, "cpus_per_process": 1},
}
HEAD = "sweep-head-svc.warm-dist.svc.cluster.local"
HOSTS = {"s3": "10.77.0.3", "mlflow": "10.77.0.3", HEAD: "10.77.0.1"}
HOSTS |= {f"digits-node-0-{number}.digits": f"10.77.0.{number + 1}" for number in (0, 1)}


class Place(NamedTuple):
    """A cluster with S3 and MLflow, and how the parts of its data set and the whole were packed."""

    kubelet: Kubelet
    world: World
    pods: dict[str, Object]
    packed: list[tuple[int, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    need()
    configs = tmp_path_factory.mktemp("pods")
    for name, tree in (("digits", CONFIG), ("evaluated", CONFIG | {"eval": EVAL}), ("sweep", SWEEP)):
        (configs / f"{name}.json").write_text(json.dumps(tree))
    packing = ["digits", "s3://warm-dist/digits8", "--resolution", "8", "--shard-size", "300"]
    objects = render(OVERLAYS / "dev") + launched("pack", "--nodes", "2", "--", *packing)
    objects += launched("render", "--config", f"{configs}/digits.json", "--nodes", "2")
    objects += launched("render", "--config", f"{configs}/sweep.json", "--nodes", "1", "--processes", "2")
    world = World(objects)
    pods = {pod["metadata"]["name"]: pod for pod in world.pods}
    secrets = {
        "s3-credentials": {"AWS_ACCESS_KEY_ID": token_hex(10), "AWS_SECRET_ACCESS_KEY": token_hex(20)},
        "ray-token": {"auth_token": token_hex(32)},
        "mlflow-database": {"uri": "sqlite:////scratch/mlflow.db"},  # PostgreSQL is test_tracking's
    }
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as folder,  # short, for Ray's sockets
        Cluster(3, Path(folder) / "c") as cluster,
        Kubelet(cluster, Path(folder), objects, secrets, HOSTS) as kubelet,
    ):
        kubelet.start(pods["s3-0"], "node3")
        mlflow = kubelet.start(pods["mlflow-0"], "node3")
        packed = []
        for names in (["part-0-0", "part-0-1"], ["whole-0-0"]):
            running = [kubelet.start(pods[f"pack-digits8-{name}"], f"node{node}") for node, name in enumerate(names, 1)]
            packed += [(container.wait(120), container.said()) for container in running]
        mlflow.until("Application startup complete")
        yield Place(kubelet, world, pods, packed)


class Attempt:
    """One life of the training's two pods, on disks of its own. `end` waits for it; codes, said, ends: of each pod then."""

    def __init__(self, place: Place, number: int) -> None:
        pods = [place.pods[f"digits-node-0-{node}"] for node in (0, 1)]
        self.number = number
        self.running = [place.kubelet.start(pod, f"node{node}", number) for node, pod in enumerate(pods, 1)]
        self.folders = [place.kubelet.volume(pod, "scratch", number) / "digits" for pod in pods]

    def until(self, nimg: int) -> Container:
        """The first node's container, when it has trained so far."""
        first = self.running[0]
        wait_for("steps", lambda: self.nimg() >= nimg or first.process.poll() is not None, 120)
        assert first.process.poll() is None, first.said()
        return first

    def lines(self) -> list[dict[str, Any]]:
        path = self.folders[0] / "metrics.jsonl"
        return [line for line in map(parse_line, path.read_bytes().splitlines()) if line] if path.exists() else []

    def nimg(self) -> int:
        """How far it has trained itself: the lines of lives before it come with the checkpoint."""
        mine = (line for line in self.lines() if line["attempt"] == self.number + 1 and line["kind"] == "train")
        return max((line["nimg"] for line in mine), default=0)

    def end(self) -> Attempt:
        self.codes = [container.wait(150) for container in self.running]
        self.said = [container.said() for container in self.running]
        self.ends = [read_json(folder / "exit.json") or {} for folder in self.folders]
        return self


class Story(NamedTuple):
    """identity: of the first process, as the kernel has it."""

    validated: tuple[int, str]
    identity: dict[str, str]
    drained_s: float
    attempts: list[Attempt]


@pytest.fixture(scope="module")
def story(place: Place) -> Story:
    """A drain, SIGTERM alone, and then to the end."""
    pod = place.pods["digits-node-0-0"]
    validate = place.kubelet.start(pod, "node1", 0, pod["spec"]["initContainers"][0])
    validated = validate.wait(120), validate.said()
    first = Attempt(place, 0)
    status = Path(f"/proc/{first.until(DRAINED_AT).first()}/status").read_text()
    identity = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    _, drained_s = first.running[1].drain()
    first.end()
    second = Attempt(place, 1)
    second.until(STOPPED_AT).terminate()
    return Story(validated, identity, drained_s, [first, second.end(), Attempt(place, 2).end()])


def test_parts_are_packed_and_become_one_data_set(place: Place):
    codes, said = zip(*place.packed, strict=True)
    assert codes == (0, 0, 0), said
    assert "part 1/2 is packed" in said[0]
    assert "part 2/2 is packed" in said[1]
    assert "1797 images 8x8x1, 10 classes, 6 shards" in said[2]


def test_the_init_container_checks_the_config_for_the_world(story: Story):
    code, said = story.validated
    assert code == 0, said
    assert "batch 16 = 2 ranks x 8 images x 1 accumulations" in said


def test_nobody_but_the_uid_without_a_capability(story: Story):
    assert story.identity["Name"].startswith("python")
    assert story.identity["NSpid"].split()[-1] == "1"
    assert set(story.identity["Uid"].split() + story.identity["Gid"].split()) == {"10001"}
    assert story.identity["Groups"].strip() == ""
    assert {int(story.identity[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert story.identity["NoNewPrivs"] == "1"


def test_a_drained_node_stops_both_and_both_say_so(place: Place, story: Story):
    first = story.attempts[0]
    assert first.codes == [75, 75], first.said
    assert [end["code"] for end in first.ends] == [75, 75]
    assert "parallel.preemption_file /scratch/stop" in first.ends[0]["reason"]
    assert first.ends[0]["nimg"] >= DRAINED_AT
    assert story.drained_s < 60
    jobset = dict(jobsets(place.world))["TrainJob/digits"]
    (job,) = jobset["spec"]["replicatedJobs"]
    for told in (True, False):  # the drained pod was told so, the other was not: all pods anew, and it does not count
        assert outcome(jobset, job, "node", 75, told) == FREE


def test_sigterm_alone_does_so_too(story: Story):
    """Fault: a launch/node.py that, as PID 1 of its pod, has no handler that forwards SIGTERM."""
    second = story.attempts[1]
    assert second.codes == [75, 75], second.said
    assert second.ends[0]["reason"].startswith("Stopped: SIGTERM on rank 0 (host digits-node-0-0) at nimg ")


def test_restarted_pods_with_empty_disks_go_on_from_the_checkpoint(story: Story):
    third = story.attempts[2]
    assert third.codes == [0, 0], third.said
    begun = 0
    for number, attempt in enumerate(story.attempts, 1):
        ended = attempt.ends[0]["nimg"]
        trained = [line["nimg"] for line in attempt.lines() if line["kind"] == "train" and line["attempt"] == number]
        assert trained == list(range(begun + BATCH, ended + BATCH, BATCH))
        if begun:
            assert f"resumed at nimg {begun} from s3://warm-dist/runs/digits/checkpoints/" in attempt.said[0]
        begun = ended
    end = {key: value for key, value in third.ends[0].items() if key not in ("reason", "sha256")}
    assert end == {"code": 0, "nimg": TOTAL, "resumable": False, "attempt": 3}


def test_mlflow_has_all_of_it_as_one_run(place: Place, story: Story):
    assert story.attempts[2].codes == [0, 0]
    query = "select status, max(step) from runs join metrics using (run_uuid) where name = 'digits' and key = 'train/loss' group by 1"
    with closing(sqlite3.connect(place.kubelet.volume(place.pods["mlflow-0"], "scratch") / "mlflow.db")) as database:
        assert database.execute(query).fetchall() == [("FINISHED", TOTAL)]


class Swept(NamedTuple):
    """What the submitter saw, with the token and with another, and the table in the store."""

    said: str
    refused: tuple[int, str]
    table: str


@pytest.fixture(scope="module")
def swept(place: Place) -> Swept:
    """Starts Ray, submits, and reads what came of it."""
    (job,) = place.world.of_kind("RayJob")
    cluster, ray = job["spec"]["rayClusterSpec"], []
    (workers,) = cluster["workerGroupSpecs"]
    for node, name, group, words in [
        ("node1", "sweep-head", cluster["headGroupSpec"], "--head"),
        ("node2", "sweep-trials-worker-0", workers, f"--address={HEAD}:6379"),
    ]:
        flags = " ".join(f"--{key}={value}" for key, value in group["rayStartParams"].items())
        line = f"ulimit -n 65536; ray start {words} --block --metrics-export-port=8080 {flags}"
        ray.append(in_shell(place, name, node, 0, line))
    for container in ray:
        container.until("--block")
    refused = in_shell(place, "sweep-submitter", "node1", 1, "ray job list", {"RAY_AUTH_TOKEN": "0" * 64})
    submit = f"ray job submit --submission-id sweep-1 -- {job['spec']['entrypoint']}"
    done = in_shell(place, "sweep-submitter", "node1", 2, submit)
    assert done.wait(200) == 0, "\n".join([done.said(), *(container.said() for container in ray)])
    read = "from warm_dist.store.open import open_store; print(open_store('s3://warm-dist/sweep', None).read('results/table.txt').decode())"
    table = in_shell(place, "pack-digits8-whole-0-0", "node1", 3, f'python -c "{read}"')
    assert table.wait(60) == 0, table.said()
    return Swept(done.said(), (refused.wait(60), refused.said()), table.said())


def in_shell(
    place: Place, name: str, node: str, attempt: int, line: str, env: dict[str, str] | None = None
) -> Container:
    """A line in a pod's container, with the address that KubeRay gives to what submits."""
    container: Object = place.pods[name]["spec"]["containers"][0]
    more = {"RAY_ADDRESS": f"http://{HEAD}:8265", **(env or {})} if name == "sweep-submitter" else {}
    variables = [*container["env"], *({"name": key, "value": value} for key, value in more.items())]
    changed = container | {"env": variables, "command": ["/bin/bash", "-c", line], "args": []}
    return place.kubelet.start(place.pods[name], node, attempt, changed)


def test_the_sweep_runs_on_the_worker_and_its_results_are_in_the_store(swept: Swept):
    assert "ray: joined" in swept.said
    assert "ray: a trial takes 1 CPU on 1 of 2 machines, the largest with 2 CPU and 0 GPU" in swept.said
    assert re.search(r"^ +1 +0 +finished +320 ", swept.table, re.M), swept.table


def test_ray_refuses_another_token(swept: Swept):
    code, said = swept.refused
    assert code != 0
    assert "token" in said.lower()
