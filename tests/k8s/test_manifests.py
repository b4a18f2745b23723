"""The manifests, as far as a machine without a cluster can tell: every overlay, alone and with each component, and new jobs."""

from __future__ import annotations

import functools
import json
import re

import pytest

from tests.k8s import crds, monitoring
from tests.k8s.checks import CHECKS, NEED_CRDS, Check, findings
from tests.k8s.expand import expand
from tests.k8s.objects import containers, distinct, find, name_of, of_kind, quantity, templates
from tests.k8s.programs import variables
from tests.k8s.render import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    Object,
    components,
    folders,
    launched,
    overlays,
    render,
    world,
    worlds,
)
from tests.processes import ROOT

CONFIGS = ROOT / "configs"


@functools.cache
def seen(name: str) -> tuple[list[Object], list[Object]]:
    """A world and its pods, which checks only look at."""
    objects = world(name)
    return objects, expand(objects)


def test_there_is_something_to_check():
    assert {"dev", "gpu"} <= set(overlays())
    assert {"irsa", "jobset"} <= set(components())
    kinds = {tree["kind"] for tree in seen("gpu")[0]}
    assert {
        "TrainJob",
        "TrainingRuntime",
        "RayJob",
        "JobSet",
        "ClusterQueue",
        "Deployment",
        "StatefulSet",
        "PodMonitor",
    } <= kinds


@pytest.mark.parametrize("folder", folders(K8S), ids=lambda folder: str(folder.relative_to(K8S)))
def test_every_kustomization_renders_without_a_network(folder):
    if COMPONENTS in folder.parents:
        assert folder.name in components(), "which worlds() renders with every overlay"
        return
    text = (folder / "kustomization.yaml").read_text()
    assert not re.search(r"https?://|git@|github\.com", re.sub(r"value: \S+|#.*", "", text)), "a base somewhere else"
    assert render(folder)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", worlds())
def test_no_check_has_anything_to_say(name: str, check: Check):
    if check in NEED_CRDS:
        crds.need_crds()
    assert check(*seen(name)) == []


@pytest.mark.parametrize("arguments", [
    ["render", "--config", "ffhq64.json", "--nodes", "2", "--gpus", "8", "--set", "checkpoint.url=s3://your-bucket/runs/ffhq64"],
    ["render", "--config", "cifar10.json", "--nodes", "1", "--gpus", "4", "--set", "checkpoint.url=s3://your-bucket/runs/c", "--jobset"],
    ["render", "--config", "sweep_schedule_imagenet64.json", "--nodes", "4", "--gpus", "8"],
    ["pack", "--nodes", "4", "--", "/images/train", "s3://your-bucket/photos64", "--resolution", "64"],
], ids=["training", "training-as-jobset", "sweep", "packing"])  # fmt: skip
def test_a_rendered_job_fits_the_cluster(arguments: list[str]):
    crds.need_crds()
    assert (
        findings(
            render(OVERLAYS / "gpu")
            + seen_jobs()
            + launched(*(str(CONFIGS / word) if word.endswith(".json") else word for word in arguments))
        )
        == {}
    )


def seen_jobs() -> list[Object]:
    """The jobs that stand in the overlay: PodMonitors and policies select nothing without any."""
    return render(OVERLAYS / "gpu" / "jobs")


@pytest.mark.parametrize("overlay", overlays())
def test_a_training_without_trainer_has_the_same_pods(overlay: str):
    """launch/k8s.py render --jobset and what Trainer does, written down twice by two people."""
    with_trainer, without = (
        [pod for pod in seen(name)[1] if "validate" in {container["name"] for container in containers(pod)}]
        for name in (overlay, f"{overlay}+jobset")
    )
    assert with_trainer
    for ours, theirs in zip(with_trainer, without, strict=True):
        for pod in (ours := json.loads(json.dumps(ours)), theirs := json.loads(json.dumps(theirs))):
            del pod["metadata"]["ownerReferences"]
            pod["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name", None)
            for container in containers(pod):
                container["env"] = sorted(container["env"], key=lambda item: item["name"])
                container["ports"] = sorted(container.get("ports", []), key=lambda item: item["containerPort"])
                for port in container["ports"]:
                    port.pop("name", None)
                container["resources"] = {
                    kind: {key: quantity(value) for key, value in given.items()}
                    for kind, given in container["resources"].items()
                }
            for volume in pod["spec"]["volumes"]:
                volume.get("configMap", {}).pop("name", None)
        assert ours == theirs


def test_a_training_s_pods_are_what_trainer_makes():
    pods = [pod for pod in seen("gpu")[1] if pod["metadata"]["name"].startswith("imagenet64-node-")]
    assert [pod["metadata"]["name"] for pod in pods] == [f"imagenet64-node-0-{number}" for number in range(4)]
    for number, pod in enumerate(pods):
        (node,) = pod["spec"]["containers"]
        told = {key: value for key, value in variables(node).items() if key.startswith("PET_")}
        assert told == {
            "PET_NNODES": "4",
            "PET_NPROC_PER_NODE": "8",
            "PET_NODE_RANK": str(number),
            "PET_MASTER_ADDR": "imagenet64-node-0-0.imagenet64",
            "PET_MASTER_PORT": "29500",
        }
        assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == (f"imagenet64-node-0-{number}", "imagenet64")
        assert 29500 in [port["containerPort"] for port in node["ports"]]
        assert node["resources"]["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize("overlay", overlays())
def test_a_cluster_without_trainer_gets_nothing_of_its_kinds(overlay: str):
    kinds = [name_of(tree) for tree in seen(f"{overlay}+jobset")[0] if crds.group_of(tree) == "trainer.kubeflow.org"]
    assert kinds == []


def test_workload_identity_is_for_whoever_else_has_the_secret():
    """And for nobody who has no business with S3."""
    objects, pods = seen("gpu+irsa")
    reads = set()
    for pod in pods:
        sources = [item.get("secretRef", {}) for container in containers(pod) for item in container.get("envFrom", [])]
        assert all(source.get("optional") for source in sources if source.get("name") == "s3-credentials"), name_of(pod)
        if "s3-credentials" in [source.get("name") for source in sources]:
            reads.add(pod["spec"]["serviceAccountName"])
    given = {
        tree["metadata"]["name"]
        for tree in of_kind(objects, "ServiceAccount")
        if "eks.amazonaws.com/role-arn" in tree["metadata"].get("annotations", {})
    }
    assert given == reads == {"trainer", "ray", "packer", "mlflow"}


def test_every_pod_template_is_expanded_once():
    """As many kinds of pods as there are templates: none hides inside a custom resource. A runtime's is its TrainJobs'."""
    objects, pods = seen("gpu")
    written = [path for tree in objects if tree["kind"] != "TrainJob" for path, _ in templates(tree)]
    assert len(distinct(pods)) == len(written)


def test_the_crds_are_those_that_the_manifests_use():
    crds.need_crds()
    used = {
        name_of(tree) for tree in seen("gpu")[0] + seen("dev")[0] if crds.is_custom(tree) and crds.crd_of(tree) is None
    }
    assert not used


def test_gauges_are_read_from_the_code():
    names = monitoring.exported()
    assert {
        "warm_dist_train_loss",
        "warm_dist_train_images_per_s",
        "warm_dist_train_data_s",
        "warm_dist_rank_forward_s",
    } <= names
    assert {"warm_dist_heartbeat_age_s", "warm_dist_checkpoint_age_s", "warm_dist_upload_failed"} <= names
    assert not {"warm_dist_train_images", "warm_dist_event_text", "warm_dist_rank_loss"} & names


def test_the_paths_of_the_image_are_those_of_the_checks():
    text = (ROOT / "k8s" / "image" / "Containerfile").read_text()
    assert "WORKDIR /opt/warm-dist" in text
    assert find(seen("gpu")[0], "Namespace", "warm-dist")
    assert {tree["metadata"]["name"] for tree in of_kind(seen("gpu")[0], "Service")} == {"mlflow", "postgres"}
