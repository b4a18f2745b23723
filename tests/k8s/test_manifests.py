"""The manifests, as far as a machine without a cluster can tell: every overlay, alone and with each component, and new jobs."""

from __future__ import annotations

import pytest

from tests.k8s import crds
from tests.k8s.checks import World, findings
from tests.k8s.objects import containers
from tests.k8s.render import K8S, launched, objects_of, render, worlds


@pytest.mark.parametrize("name", worlds())
def test_no_check_has_anything_to_say(name: str):
    """Fault: an overlay, alone or with a component, with one of the mistakes listed in tests/k8s/mistakes.py."""
    assert findings(World(objects_of(name))) == {}


def test_custom_resources_are_checked():
    """Fault: a CI without K8S_CRDS, in which no custom resource is checked."""
    crds.need_crds()


def test_crds_that_lack_are_told_of(monkeypatch, tmp_path):
    monkeypatch.setattr(crds, "crds", crds.crds.__wrapped__)
    monkeypatch.setenv("K8S_CRDS", str(tmp_path))
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="NO CUSTOM RESOURCE WAS CHECKED"):
        crds.need_crds()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="NO CUSTOM RESOURCE WAS CHECKED"):
        crds.need_crds()


def test_a_rule_that_cannot_be_evaluated_is_no_pass():
    assert crds.broken({"rule": "self.a.b == quantity(self.c)"}, {"a": {}, "c": "1"}).startswith("rule cannot be")
    assert crds.broken({"rule": "self.a > 1 &&"}, {"a": 2}).startswith("rule cannot be evaluated")
    assert crds.broken({"rule": "self == oldSelf"}, {"a": 2}) == "", "of changes only"
    assert crds.broken({"rule": "self.a > 1", "message": "too small"}, {"a": 1}) == "too small"


def test_there_is_something_to_check():
    """Fault: an overlay, a component or a kind missing from every world, so that no check sees it."""
    assert {"dev", "gpu", "gpu+irsa", "gpu+jobset"} <= set(worlds())
    kinds = {tree["kind"] for tree in objects_of("gpu")}
    assert kinds >= {"TrainJob", "RayJob", "JobSet", "ClusterQueue", "Deployment", "StatefulSet", "PodMonitor"}
    for name in worlds():
        trained = {tree["kind"] for tree in objects_of(name)} & {"TrainJob", "TrainingRuntime"}
        assert trained == (set() if name.endswith("+jobset") else {"TrainJob", "TrainingRuntime"})


def test_every_kustomization_renders_without_a_network():
    folders = {path.parent for path in K8S.rglob("kustomization.yaml")} - set((K8S / "components").iterdir())
    assert all(render(folder) for folder in sorted(folders))


def test_new_jobs_fit_the_cluster():
    """Fault: a job of launch/k8s.py that the cluster would refuse or never start, such as one above the quota."""
    trained = ["--set", "checkpoint.url=s3://your-bucket/runs/a"]
    new = [
        ["render", "--config", "configs/ffhq64.json", "--nodes", "2", "--gpus", "8", *trained],
        ["render", "--config", "configs/cifar10.json", "--nodes", "1", "--gpus", "4", *trained, "--jobset"],
        ["render", "--config", "configs/sweep_schedule_imagenet64.json", "--nodes", "4", "--gpus", "8"],
        ["pack", "--nodes", "4", "--", "/images/train", "s3://your-bucket/photos64", "--resolution", "64"],
    ]
    assert findings(World(objects_of("gpu") + [tree for arguments in new for tree in launched(*arguments)])) == {}


def test_workload_identity_is_for_whoever_else_has_the_secret():
    """And for nobody who has no business with S3.

    Fault: an account that reads S3 but has no role, or has a role but reads nothing.
    """
    world, reads = World(objects_of("gpu+irsa")), set()
    for pod in world.pods:
        sources = [item.get("secretRef", {}) for container in containers(pod) for item in container.get("envFrom", [])]
        assert all(source["optional"] for source in sources if source)
        if sources and any(sources):
            reads.add(pod["spec"]["serviceAccountName"])
    accounts = {tree["metadata"]["name"]: tree["metadata"] for tree in world.of_kind("ServiceAccount")}
    given = {name for name, one in accounts.items() if "eks.amazonaws.com/role-arn" in one.get("annotations", {})}
    assert given == reads == {"trainer", "ray", "packer", "mlflow"}
