"""Kueue's part: every job is queued, its queue exists, and it fits the quota alone."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator

from tests.k8s.objects import QUEUE, component, containers, find, name_of, of_kind, owner, quantity, selects, space_of
from tests.k8s.render import Object

PRIORITY = "kueue.x-k8s.io/priority-class"


def queued(objects: list[Object]) -> Iterator[tuple[Object, Object | None]]:
    """Jobs that Kueue is to admit, each with its ClusterQueue if that can be found."""
    for tree in of_kind(objects, "TrainJob", "RayJob", "JobSet", "Job"):
        name = tree["metadata"].get("labels", {}).get(QUEUE)
        if name:
            local = find(objects, "LocalQueue", name, space_of(tree))
            yield tree, find(objects, "ClusterQueue", local["spec"]["clusterQueue"]) if local else None


def queues(objects: list[Object], pods: list[Object]) -> list[str]:
    """Jobs name a LocalQueue of their namespace and a priority; queues and flavors lead on to one that exists and lets them in."""
    messages = []
    for tree in of_kind(objects, "TrainJob", "RayJob", "JobSet"):
        labels = tree["metadata"].get("labels", {})
        if QUEUE not in labels:
            messages.append(f"{name_of(tree)}: is not queued, it has no label {QUEUE}")
        elif find(objects, "LocalQueue", labels[QUEUE], space_of(tree)) is None:
            messages.append(f"{name_of(tree)}: no LocalQueue {labels[QUEUE]} in {space_of(tree)}")
        if tree["spec"].get("suspend") is not True:
            messages.append(f"{name_of(tree)}: suspend is not true, it would start before it is admitted")
        if find(objects, "WorkloadPriorityClass", labels.get(PRIORITY, "")) is None:
            messages.append(f"{name_of(tree)}: no WorkloadPriorityClass {labels.get(PRIORITY)}")
    for tree in of_kind(objects, "LocalQueue"):
        cluster = find(objects, "ClusterQueue", tree["spec"]["clusterQueue"])
        space = find(objects, "Namespace", space_of(tree))
        if cluster is None:
            messages.append(f"{name_of(tree)}: no ClusterQueue {tree['spec']['clusterQueue']}")
        elif space is not None:
            name = space["metadata"]["name"]
            labels = {**space["metadata"].get("labels", {}), "kubernetes.io/metadata.name": name}
            if not selects(cluster["spec"].get("namespaceSelector"), labels):
                messages.append(f"{name_of(cluster)}: its namespaceSelector does not let {name} in")
    for tree in of_kind(objects, "ClusterQueue"):
        for flavor in _flavors(tree):
            if find(objects, "ResourceFlavor", flavor["name"]) is None:
                messages.append(f"{name_of(tree)}: no ResourceFlavor {flavor['name']}")
    return messages


def priorities(objects: list[Object], pods: list[Object]) -> list[str]:
    """A training goes before packing, and that before a sweep, whose place it may take."""
    ranked = {tree["metadata"]["name"]: int(tree["value"]) for tree in of_kind(objects, "WorkloadPriorityClass")}
    order = [name for name in ("train", "data", "sweep") if name in ranked]
    messages = [
        f"WorkloadPriorityClass/{first}: {ranked[first]} is not above {second}'s {ranked[second]}"
        for first, second in itertools.pairwise(order)
        if ranked[first] <= ranked[second]
    ]
    kinds = {"TrainJob": "train", "RayJob": "sweep", "JobSet": "data"}
    for tree in of_kind(objects, *kinds):
        wanted = "train" if tree["kind"] == "JobSet" and _trains(tree, pods) else kinds[tree["kind"]]
        given = tree["metadata"].get("labels", {}).get(PRIORITY)
        if given in ranked and given != wanted:
            messages.append(f"{name_of(tree)}: has the priority {given}, needs {wanted}")
    for tree in of_kind(objects, "ClusterQueue"):
        if tree["spec"].get("preemption", {}).get("withinClusterQueue", "Never") == "Never":
            messages.append(
                f"{name_of(tree)}: preemption.withinClusterQueue is Never: a training would wait for a sweep's end"
            )
    return messages


def _trains(tree: Object, pods: list[Object]) -> bool:
    return any(owner(pod) == name_of(tree) and component(pod) == "trainer" for pod in pods)


def _flavors(cluster: Object) -> list[Object]:
    return [flavor for group in cluster["spec"].get("resourceGroups", []) for flavor in group["flavors"]]


def requests(pod: Object) -> Counter[str]:
    """What the scheduler reserves: the sum over containers, or the largest init container if that is more. A limit without
    a request is one."""
    total: Counter[str] = Counter()
    first: Counter[str] = Counter()
    for container in containers(pod):
        resources = container.get("resources", {})
        mine = {
            key: quantity(value)
            for key, value in {**resources.get("limits", {}), **resources.get("requests", {})}.items()
        }
        if container in pod["spec"]["containers"] or container.get("restartPolicy") == "Always":
            total.update(mine)
        else:
            first |= Counter(mine)
    return total | first


def pod_sets(tree: Object, pods: list[Object]) -> list[tuple[Object, Counter[str]]]:
    """A job's sets of equal pods: one of them, and what all of the set ask for."""
    sums: dict[str, Counter[str]] = {}
    first: dict[str, Object] = {}
    for pod in pods:
        if owner(pod) == name_of(tree) and space_of(pod) == space_of(tree):
            key = re.sub(r"(-\d+)+$", "", pod["metadata"]["name"])
            first.setdefault(key, pod)
            sums.setdefault(key, Counter()).update(requests(pod))
    return [(first[key], sums[key]) for key in first]


def covered(objects: list[Object], pods: list[Object]) -> list[str]:
    """A job asks only for resources that its ClusterQueue covers: with any other it is never admitted."""
    messages = []
    for tree, cluster in queued(objects):
        known = {
            name
            for group in (cluster or {"spec": {}})["spec"].get("resourceGroups", [])
            for name in group["coveredResources"]
        }
        asked = {name for _, total in pod_sets(tree, pods) for name, value in total.items() if value}
        if cluster is not None and asked - known:
            messages.append(
                f"{name_of(tree)}: asks for {sorted(asked - known)}, {name_of(cluster)} covers {sorted(known)}"
            )
    return messages


def quota(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every job fits the nominal quota alone, each of its pod sets in a flavor whose taints and labels it can meet."""
    messages = []
    for tree, cluster in queued(objects):
        sets = pod_sets(tree, pods)
        for group in cluster["spec"].get("resourceGroups", []) if cluster is not None else []:
            problem = _fits(objects, group, sets)
            if problem and cluster is not None:
                messages.append(f"{name_of(tree)}: {problem}, of {name_of(cluster)}")
    return messages


def _fits(objects: list[Object], group: Object, sets: list[tuple[Object, Counter[str]]]) -> str:
    """Empty if there is a choice of flavors in which all sets fit; else what lacks in the best one."""
    best = ""
    relevant = [(pod, total) for pod, total in sets if any(total[name] for name in group["coveredResources"])]
    for choice in itertools.product(group["flavors"], repeat=len(relevant)):
        problem = _lacks(objects, group, list(zip(choice, relevant, strict=True)))
        if not problem:
            return ""
        best = best or problem
    return best


def _lacks(objects: list[Object], group: Object, placed: list[tuple[Object, tuple[Object, Counter[str]]]]) -> str:
    used: dict[str, Counter[str]] = {}
    for flavor, (pod, total) in placed:
        refusal = _refuses(find(objects, "ResourceFlavor", flavor["name"]), pod)
        if refusal:
            return f"{pod['metadata']['name']} {refusal}"
        used.setdefault(flavor["name"], Counter()).update(total)
    for flavor in group["flavors"]:
        for resource in flavor["resources"]:
            asked = used.get(flavor["name"], Counter())[resource["name"]]
            if resource["name"] in group["coveredResources"] and asked > quantity(resource["nominalQuota"]):
                return f"asks for {asked:g} {resource['name']}, the quota of flavor {flavor['name']} is {resource['nominalQuota']}"
    return ""


def _refuses(flavor: Object | None, pod: Object) -> str:
    """Why a pod cannot go to a flavor's nodes: taints, or node labels that contradict its selector."""
    spec = (flavor or {}).get("spec", {}) or {}
    tolerations = [*pod["spec"].get("tolerations", []), *spec.get("tolerations", [])]
    for taint in spec.get("nodeTaints", []):
        if taint["effect"] != "PreferNoSchedule" and not any(_tolerates(item, taint) for item in tolerations):
            return f"does not tolerate {taint['key']}"
    for key, value in spec.get("nodeLabels", {}).items():
        if pod["spec"].get("nodeSelector", {}).get(key, value) != value:
            return f"selects nodes of another {key}"
    return ""


def _tolerates(item: Object, taint: Object) -> bool:
    if item.get("effect", taint["effect"]) != taint["effect"] or item.get("key", taint["key"]) != taint["key"]:
        return False
    return item.get("operator", "Equal") == "Exists" or item.get("value", "") == taint.get("value", "")
