"""What schemas cannot know: facts that these objects must keep so that others go well with them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.k8s.objects import labels, name_of, owner, quantity, space_of
from tests.k8s.programs import runs
from tests.k8s.trainings import trainings
from tests.k8s.world import World, check
from tests.support.processes import ROOT

LOST = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|CREDENTIAL")
ENFORCED = "pod-security.kubernetes.io/enforce"


def locked(package: str) -> str:
    """The version of a package in requirements.lock."""
    (found,) = re.findall(rf"^{package}==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    return found


@check
def ray_jobs(world: World) -> Iterator[str]:
    """A sweep goes on after any end, its cluster goes when it has ended, is of the image's Ray, and is not shown to the world."""
    for tree in world.of_kind("RayJob"):
        spec, cluster = tree["spec"], tree["spec"]["rayClusterSpec"]
        for problem, wrong in {
            "shutdownAfterJobFinishes is not true, which Kueue asks for": not spec.get("shutdownAfterJobFinishes"),
            "without --resume a second cluster would be refused": "--resume" not in spec["entrypoint"].split(),
            "rayVersion is not the image's": cluster.get("rayVersion") != locked("ray"),
            "its serviceType shows Ray to the world": cluster["headGroupSpec"].get("serviceType") != "ClusterIP",
            "authOptions.mode is not token": cluster.get("authOptions", {}).get("mode") != "token",
        }.items():
            if wrong:
                yield f"{name_of(tree)}: {problem}"


@check
def security(world: World) -> Iterator[str]:
    """What trivy does not see. Namespaces enforce `restricted`, which refuses a container that may be root or has no AppArmor;
    nobody has a token for Kubernetes; a pod's volumes belong to its group, or a claim, made for root, cannot be written."""
    for name in sorted({space_of(pod) for pod in world.pods}):
        space = world.find("Namespace", name)
        if space is None or labels(space).get(ENFORCED) != "restricted":
            yield f"Namespace/{name}: is missing, or its label {ENFORCED} is not restricted"
    for tree in world.of_kind("ServiceAccount"):
        if tree.get("automountServiceAccountToken") is not False:
            yield f"{name_of(tree)}: automountServiceAccountToken is not false"
    for pod in world.kinds:
        context = pod["spec"].get("securityContext", {})
        if pod["spec"].get("automountServiceAccountToken") is not False:
            yield f"{owner(pod)}: automountServiceAccountToken is not false"
        if pod["spec"].get("volumes") and context.get("fsGroup") != context.get("runAsGroup"):
            yield f"{owner(pod)}: fsGroup {context.get('fsGroup')} is not runAsGroup {context.get('runAsGroup')}"
    for label, container, _ in world.containers():
        context = container.get("securityContext", {})
        if context.get("runAsNonRoot") is False or context.get("appArmorProfile", {}).get("type") == "Unconfined":
            yield f"{label}: runAsNonRoot is false, or appArmorProfile Unconfined"
        given = container.get("resources", {})
        requested, limit = (given.get(kind, {}).get("memory", 0) for kind in ("requests", "limits"))
        if limit and quantity(limit) < quantity(requested):
            yield f"{label}: requests {requested} of memory, the limit is {limit}"


@check
def literal_secrets(world: World) -> Iterator[str]:
    """What is called a secret comes from a Secret, and pods never fall back to their node's credentials."""
    for label, container, _ in world.containers():
        names = [item["name"] for item in container.get("env", []) if item.get("value")]
        yield from (f"{label}: {name} is written out" for name in names if SECRET_NAME.search(name))
    for tree in world.of_kind("ConfigMap"):
        yield from (f"{name_of(tree)}: {key} is in a ConfigMap" for key in tree["data"] if SECRET_NAME.search(key))
        if "AWS_DEFAULT_REGION" in tree["data"] and tree["data"].get("AWS_EC2_METADATA_DISABLED") != "true":
            yield f"{name_of(tree)}: AWS_EC2_METADATA_DISABLED is not true"


@check
def lost_nodes(world: World) -> Iterator[str]:
    """All ranks wait for one on a lost node: it is given up within a minute, not five."""
    for training in trainings(world):
        tolerations = training.nodes[0].pod["spec"].get("tolerations", [])
        told = {item.get("key"): item["tolerationSeconds"] for item in tolerations if "tolerationSeconds" in item}
        yield from (f"{training.name}: waits for a node with {key}" for key in LOST if told.get(key, 300) > 60)


@check
def packing(world: World) -> Iterator[str]:
    """Every part of a data set is packed, once, and all are there before they are made one."""
    for tree in world.of_kind("JobSet"):
        first, *rest = tree["spec"]["replicatedJobs"]
        for job in rest:
            if {"name": first["name"], "status": "Complete"} not in job.get("dependsOn", []):
                yield f"{name_of(tree)}: {job['name']} does not wait until {first['name']} is complete"
        mine = [run for run in runs(world) if owner(run.pod) == name_of(tree)]
        parts = [run.args.part for run in mine if getattr(run.args, "part", None)]
        if parts != [(number, len(parts)) for number in range(1, len(parts) + 1)]:
            yield f"{name_of(tree)}: its pods pack the parts {parts}"


@check
def budgets(world: World) -> Iterator[str]:
    """A PodDisruptionBudget lets one pod go: else no node with it can be drained."""
    for tree in world.of_kind("PodDisruptionBudget"):
        count = len(world.selected(tree, tree["spec"]["selector"]))
        if count and tree["spec"].get("minAvailable", count - tree["spec"].get("maxUnavailable", 0)) >= count:
            yield f"{name_of(tree)}: lets none of {count} pods go"


@check
def canonical(world: World) -> Iterator[str]:
    """A TrainJob's memory is as Kubernetes itself writes it: a controller that sends it back would change what never changes."""
    for tree in world.of_kind("TrainJob"):
        for value in [given["memory"] for given in tree["spec"]["trainer"]["resourcesPerNode"].values()]:
            found = re.fullmatch(r"(\d+)([GT])i", value)
            if not found or int(found[1]) % 1024 == 0:
                yield f"{name_of(tree)}: {value!r} is written otherwise after the first update"
