"""The dev overlay's own commands, run for real: S3, packing in parts, a training of two nodes, a drain, a restart.

Two machines and an S3 server are network namespaces; the pods are those that the controllers would make of the manifests
(tests/k8s/expand.py), with their uid, environment, volumes and read-only root (tests/k8s/kubelet.py).
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.k8s.expand import expand
from tests.k8s.failures import FREE, jobsets
from tests.k8s.failures import outcome as verdict
from tests.k8s.kubelet import Container, Kubelet
from tests.k8s.render import Object, render
from tests.multinode.nodes import Cluster, need
from tests.processes import ROOT, wait_for
from warm_dist.files import read_json
from warm_dist.runs.metrics import parse_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
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


def k8s(*arguments: str) -> list[Object]:
    """What launch/k8s.py prints."""
    command = [sys.executable, "launch/k8s.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


class Attempt(NamedTuple):
    """One life of the training's pods: how they ended, and what they left on their disks."""

    codes: list[int]
    said: list[str]
    lines: list[dict[str, Any]]
    ends: list[dict[str, Any]]


class Story(NamedTuple):
    """All that happened. verdicts: what JobSet makes of each pod's first end."""

    packed: list[tuple[int, str]]
    validated: list[tuple[int, str]]
    drained_s: float
    verdicts: list[str]
    identity: dict[str, str]
    attempts: list[Attempt]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    need()
    folder = tmp_path_factory.mktemp("pods")
    config = folder / "digits.json"
    config.write_text(json.dumps(CONFIG))
    objects = render(ROOT / "k8s" / "overlays" / "dev")
    objects += k8s(
        "pack", "--nodes", "2", "--", "digits", "s3://warm-dist/digits8", "--resolution", "8", "--shard-size", "300"
    )
    objects += k8s("render", "--config", str(config), "--nodes", "2")
    pods = {pod["metadata"]["name"]: pod for pod in expand(objects)}
    key = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
    with Cluster(3, folder / "cluster") as cluster:
        hosts = {"s3": "10.77.0.3", "digits-node-0-0.digits": "10.77.0.1", "digits-node-0-1.digits": "10.77.0.2"}
        with Kubelet(cluster, folder, objects, {"s3-credentials": key}, hosts) as kubelet:
            (jobset,) = [tree for name, tree in jobsets(objects) if name == "TrainJob/digits"]
            yield Tale(kubelet, pods, jobset).tell()


class Tale:
    """The story, as it is told once."""

    def __init__(self, kubelet: Kubelet, pods: dict[str, Object], jobset: Object) -> None:
        self.kubelet, self.pods, self.jobset = kubelet, pods, jobset
        self.nodes = [pods["digits-node-0-0"], pods["digits-node-0-1"]]

    def tell(self) -> Story:
        self.s3 = self.kubelet.start(self.pods["s3-0"], "node3")
        packed = self._all([("pack-digits8-part-0-0", "node1"), ("pack-digits8-part-0-1", "node2")])
        packed += self._all([("pack-digits8-whole-0-0", "node1")])
        validated = self._validate()
        running = self._start(0)
        self._until(running[0], 0, DRAINED_AT)
        identity = self._identity(running[0])
        _, drained_s = running[1].drain()
        first = self._end(running, 0)
        (job,) = self.jobset["spec"]["replicatedJobs"]
        ends = zip(first.codes, (False, True), strict=True)  # the drained pod was told so, the other was not
        verdicts = [verdict(self.jobset, job, "node", code, told) for code, told in ends]
        running = self._start(1)
        self._until(running[0], 1, STOPPED_AT)
        running[0].terminate()
        second = self._end(running, 1)
        third = self._end(self._start(2), 2)
        return Story(packed, validated, drained_s, verdicts, identity, [first, second, third])

    def _all(self, places: list[tuple[str, str]]) -> list[tuple[int, str]]:
        containers = [self.kubelet.start(self.pods[name], node) for name, node in places]
        return [(container.wait(120), container.said()) for container in containers]

    def _validate(self) -> list[tuple[int, str]]:
        containers = [
            self.kubelet.start(pod, f"node{number}", 0, pod["spec"]["initContainers"][0])
            for number, pod in enumerate(self.nodes, 1)
        ]
        return [(container.wait(120), container.said()) for container in containers]

    def _start(self, attempt: int) -> list[Container]:
        return [self.kubelet.start(pod, f"node{number}", attempt) for number, pod in enumerate(self.nodes, 1)]

    def _run(self, number: int, attempt: int) -> Path:
        return self.kubelet.volume(self.nodes[number], "scratch", attempt) / "digits"

    def _lines(self, attempt: int) -> list[dict[str, Any]]:
        path = self._run(0, attempt) / "metrics.jsonl"
        return [line for line in map(parse_line, path.read_text().splitlines()) if line] if path.exists() else []

    def _nimg(self, attempt: int) -> int:
        return max((line["nimg"] for line in self._lines(attempt)), default=0)

    def _until(self, container: Container, attempt: int, nimg: int) -> None:
        wait_for("steps", lambda: self._nimg(attempt) >= nimg or container.process.poll() is not None, 120)
        assert container.process.poll() is None, container.said()

    def _identity(self, container: Container) -> dict[str, str]:
        """Of the container's first process, as the kernel has it."""
        text = Path(f"/proc/{container.first()}/status").read_text()
        return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)

    def _end(self, running: list[Container], attempt: int) -> Attempt:
        codes = [container.wait(150) for container in running]
        ends = [read_json(self._run(number, attempt) / "exit.json") or {} for number in (0, 1)]
        return Attempt(codes, [container.said() for container in running], self._lines(attempt), ends)


def test_parts_are_packed_and_become_one_data_set(story):
    codes, said = zip(*story.packed, strict=True)
    assert codes == (0, 0, 0), said
    assert "part 1/2 is packed" in said[0]
    assert "part 2/2 is packed" in said[1]
    assert "1797 images 8x8x1, 10 classes, 6 shards" in said[2]


def test_the_init_container_checks_the_config_for_the_world(story):
    for code, said in story.validated:
        assert code == 0, said
        assert "batch 16 = 2 ranks x 8 images x 1 accumulations" in said


def test_nobody_but_the_uid_without_a_capability(story):
    assert story.identity["Name"].startswith("python")
    assert story.identity["NSpid"].split()[-1] == "1"
    assert set(story.identity["Uid"].split() + story.identity["Gid"].split()) == {"10001"}
    assert story.identity["Groups"].strip() == ""
    assert {int(story.identity[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert story.identity["NoNewPrivs"] == "1"


def test_a_drained_node_stops_both_and_both_say_so(story):
    first = story.attempts[0]
    assert first.codes == [75, 75], first.said
    assert [end["code"] for end in first.ends] == [75, 75]
    assert "parallel.preemption_file /scratch/stop" in first.ends[0]["reason"]
    assert first.ends[0]["nimg"] >= DRAINED_AT
    assert story.drained_s < 60
    assert story.verdicts == [FREE, FREE]  # all pods anew, and it does not count


def test_sigterm_alone_does_so_too(story):
    second = story.attempts[1]
    assert second.codes == [75, 75], second.said
    assert second.ends[0]["reason"].startswith("Stopped: SIGTERM on rank 0 (host digits-node-0-0) at nimg ")


def test_restarted_pods_with_empty_disks_go_on_from_the_checkpoint(story):
    third = story.attempts[2]
    assert third.codes == [0, 0], third.said
    begun = 0
    for number, attempt in enumerate(story.attempts, 1):
        ended = attempt.ends[0]["nimg"]
        trained = [line["nimg"] for line in attempt.lines if line["kind"] == "train" and line["attempt"] == number]
        assert trained == list(range(begun + BATCH, ended + BATCH, BATCH))
        if begun:
            assert f"resumed at nimg {begun} from s3://warm-dist/runs/digits/checkpoints/" in attempt.said[0]
        begun = ended
    assert third.ends[0] | {"reason": ""} == {"code": 0, "reason": "", "nimg": TOTAL, "resumable": False, "attempt": 3}
