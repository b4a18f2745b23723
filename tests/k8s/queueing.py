"""Kueue's part: every job is queued, its queue exists, and it fits the quota alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from tests.k8s.objects import GPU, component, containers, labels, name_of, owner, quantity, selects, space_of
from tests.k8s.render import Object
from tests.k8s.world import World, check

QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
JOBS = ("TrainJob", "RayJob", "JobSet")
RANKS = {"train": "trainer", "data": "packer", "sweep": "ray"}
"""Priority → whose pods have it, the first first."""


@check
def queues(world: World) -> Iterator[str]:
    """Jobs name a LocalQueue of their namespace and a priority; queues and flavors lead on to one that exists and lets them in."""
    for tree in world.of_kind(*JOBS):
        queue, priority = (labels(tree).get(key, "") for key in (QUEUE, PRIORITY))
        if world.find("LocalQueue", queue, space_of(tree)) is None:
            yield f"{name_of(tree)}: no LocalQueue {queue!r} in {space_of(tree)}"
        if world.find("WorkloadPriorityClass", priority) is None:
            yield f"{name_of(tree)}: no WorkloadPriorityClass {priority!r}"
        if tree["spec"].get("suspend") is not True:
            yield f"{name_of(tree)}: suspend is not true, it would start before it is admitted"
    for tree in world.of_kind("LocalQueue"):
        name, space = tree["spec"]["clusterQueue"], {"kubernetes.io/metadata.name": space_of(tree)}
        cluster = world.find("ClusterQueue", name)
        if cluster is None or not selects(cluster["spec"].get("namespaceSelector"), space):
            yield f"{name_of(tree)}: no ClusterQueue/{name} lets {space_of(tree)} in"
    for tree in world.of_kind("ClusterQueue"):
        for flavor in _flavors(tree):
            if world.find("ResourceFlavor", flavor["name"]) is None:
                yield f"{name_of(tree)}: no ResourceFlavor {flavor['name']}"


@check
def priorities(world: World) -> Iterator[str]:
    """A training goes before packing, and that before a sweep, whose place it may take."""
    values = {tree["metadata"]["name"]: int(tree["value"]) for tree in world.of_kind("WorkloadPriorityClass")}
    for first, second in itertools.pairwise(RANKS):
        if values[first] <= values[second]:
            yield f"WorkloadPriorityClass/{first}: {values[first]} is not above {second}'s {values[second]}"
    for tree in world.of_kind(*JOBS):
        given, whose = labels(tree).get(PRIORITY), {component(pods[0]) for pods in world.made_by(tree)}
        if given in RANKS and whose - {RANKS[given], ""}:
            yield f"{name_of(tree)}: has the priority {given}, its pods are those of {sorted(whose)}"
    for tree in world.of_kind("ClusterQueue"):
        if tree["spec"].get("preemption", {}).get("withinClusterQueue", "Never") == "Never":
            yield f"{name_of(tree)}: preemption.withinClusterQueue is Never: a training would wait for a sweep's end"


def _flavors(cluster: Object) -> list[Object]:
    return [flavor for group in cluster["spec"]["resourceGroups"] for flavor in group["flavors"]]


def requests(pod: Object) -> Counter[str]:
    """What the scheduler reserves: the sum over containers, or the largest init container if that is more. A limit without
    a request is one."""
    total, first = Counter[str](), Counter[str]()
    for container in containers(pod):
        given = container.get("resources", {})
        every = {**given.get("limits", {}), **given.get("requests", {})}
        mine = Counter({key: quantity(value) for key, value in every.items()})
        total, first = (total + mine, first) if container in pod["spec"]["containers"] else (total, first | mine)
    return total | first


def _limits(flavor: Object) -> dict[str, float]:
    return {item["name"]: quantity(item["nominalQuota"]) for item in flavor["resources"]}


@check
def quota(world: World) -> Iterator[str]:
    """Every job fits the nominal quota alone, each of its sets of pods in the first flavor that takes it, as Kueue tries them; and
    no pod without a GPU may go where GPUs are."""
    for tree in world.of_kind(*JOBS):
        local = world.find("LocalQueue", labels(tree).get(QUEUE, ""), space_of(tree))
        cluster = world.find("ClusterQueue", local["spec"]["clusterQueue"]) if local else None
        used: dict[str, Counter[str]] = {}
        for pods in world.made_by(tree) if cluster else []:
            asked, problems = Counter({key: value * len(pods) for key, value in requests(pods[0]).items()}), []
            for flavor in _flavors(cluster):
                whole = used.get(flavor["name"], Counter()) + asked
                short = [f"{value:g} {key}" for key, value in whole.items() if value > _limits(flavor).get(key, 0)]
                if not (problem := _refused(world, flavor, pods[0]) or short):
                    used[flavor["name"]] = whole
                    break
                problems.append(f"{flavor['name']}: {problem}")
            else:
                yield f"{name_of(tree)}: {pods[0]['metadata']['name']} in no flavor of {name_of(cluster)}: {problems}"
    every = [flavor for cluster in world.of_kind("ClusterQueue") for flavor in _flavors(cluster)]
    for flavor in [flavor for flavor in every if _limits(flavor).get(GPU)]:
        for pod in [pod for pod in world.kinds if GPU not in requests(pod)]:
            if not _refused(world, flavor, pod):
                yield f"{owner(pod)}: wants no GPU and may fill the nodes of ResourceFlavor/{flavor['name']}"


def _refused(world: World, flavor: Object, pod: Object) -> str:
    """Why a pod cannot go to a flavor's nodes: taints, or node labels that contradict its selector."""
    spec = (world.find("ResourceFlavor", flavor["name"]) or {}).get("spec", {})
    for taint in spec.get("nodeTaints", []):
        if not any(_tolerates(item, taint) for item in pod["spec"].get("tolerations", [])):
            return f"its taint {taint['key']}"
    wanted = pod["spec"].get("nodeSelector", {})
    return next(
        (f"its {key}" for key, value in spec.get("nodeLabels", {}).items() if wanted.get(key, value) != value), ""
    )


def _tolerates(item: Object, taint: Object) -> bool:
    same = all(item.get(key, taint[key]) == taint[key] for key in ("effect", "key"))
    return same and (item.get("operator") == "Exists" or item.get("value", "") == taint.get("value", ""))
