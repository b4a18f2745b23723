"""What schemas cannot know: facts that these objects must keep so that others go well with them."""

from __future__ import annotations

import re
from typing import Any

import promql_parser

from tests.k8s.objects import QUEUE, containers, distinct, find, name_of, of_kind, owner, quantity, selects
from tests.k8s.render import Object
from tests.k8s.trainings import GPU, trainings
from tests.processes import ROOT

LOST = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|CREDENTIAL")
BINARY = ("Ki", "Mi", "Gi", "Ti", "Pi")


def locked(package: str) -> str:
    """The version of a package in requirements.lock."""
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert found
    return found[1]


def ray_jobs(objects: list[Object], pods: list[Object]) -> list[str]:
    """A sweep goes on after any end, its cluster goes when it has ended, is of the image's Ray, and is not shown to the world."""
    messages = []
    for tree in of_kind(objects, "RayJob"):
        spec, name = tree["spec"], name_of(tree)
        cluster = spec["rayClusterSpec"]
        if not spec.get("shutdownAfterJobFinishes"):
            messages.append(f"{name}: shutdownAfterJobFinishes is not true, which Kueue asks for")
        if "--resume" not in spec["entrypoint"].split():
            messages.append(f"{name}: its entrypoint has no --resume: a second cluster would be refused")
        if cluster.get("rayVersion") != locked("ray"):
            messages.append(f"{name}: rayVersion {cluster.get('rayVersion')} is not the image's {locked('ray')}")
        if cluster["headGroupSpec"].get("serviceType", "ClusterIP") != "ClusterIP":
            messages.append(f"{name}: serviceType {cluster['headGroupSpec']['serviceType']} shows Ray to the world")
        if cluster.get("authOptions", {}).get("mode") != "token":
            messages.append(f"{name}: authOptions.mode is not token")
    return messages


def groups(objects: list[Object], pods: list[Object]) -> list[str]:
    """A pod's volumes belong to its group: else a claim, made for root, cannot be written."""
    messages = []
    for pod in distinct(pods):
        context = pod["spec"].get("securityContext", {})
        if pod["spec"].get("volumes") and context.get("fsGroup") != context.get("runAsGroup"):
            messages.append(
                f"{owner(pod)}: fsGroup {context.get('fsGroup')} is not runAsGroup {context.get('runAsGroup')}"
            )
    return messages


def literal_secrets(objects: list[Object], pods: list[Object]) -> list[str]:
    """What is called a secret comes from a Secret."""
    messages = [
        f"{owner(pod)}: {item['name']} is written out in {container['name']}"
        for pod in distinct(pods)
        for container in containers(pod)
        for item in container.get("env", [])
        if SECRET_NAME.search(item["name"]) and item.get("value")
    ]
    for tree in of_kind(objects, "ConfigMap"):
        messages += [
            f"{name_of(tree)}: {key} is in a ConfigMap" for key in tree.get("data", {}) if SECRET_NAME.search(key)
        ]
    return messages


def lost_nodes(objects: list[Object], pods: list[Object]) -> list[str]:
    """All ranks wait for one on a lost node: it is given up within a minute, not five."""
    messages = []
    for training in trainings(objects, pods):
        for pod in distinct(training.pods):
            told = {
                item.get("key"): item
                for item in pod["spec"].get("tolerations", [])
                if item.get("effect") == "NoExecute"
            }
            messages += [
                f"{training.name}: waits for a node with {key} longer than a minute"
                for key in LOST
                if told.get(key, {}).get("tolerationSeconds", 300) > 60
            ]
    return messages


def flavors(objects: list[Object], pods: list[Object]) -> list[str]:
    """GPU pods tolerate the taint of a flavor that has GPUs; pods without one do not, but for those that may have one."""
    queues = of_kind(objects, "ClusterQueue")
    names = {
        flavor["name"]
        for queue in queues
        for group in queue["spec"]["resourceGroups"]
        for flavor in group["flavors"]
        if any(item["name"] == GPU and quantity(item["nominalQuota"]) for item in flavor["resources"])
    }
    messages = []
    for name in sorted(names):
        flavor = find(objects, "ResourceFlavor", name)
        taints = (flavor or {"spec": {}})["spec"].get("nodeTaints", [])
        if not taints:
            messages.append(f"ResourceFlavor/{name}: has GPUs and no nodeTaints, so that any pod may fill its nodes")
        for pod in distinct(pods):
            tolerates = all(
                any(_tolerates(one, taint) for one in pod["spec"].get("tolerations", [])) for taint in taints
            )
            gpus = any(GPU in container.get("resources", {}).get("limits", {}) for container in containers(pod))
            if gpus and not tolerates:
                messages.append(f"{owner(pod)}: wants GPUs and does not tolerate the taint of ResourceFlavor/{name}")
            if taints and not gpus and tolerates:
                messages.append(f"{owner(pod)}: wants no GPU and tolerates the taint of ResourceFlavor/{name}")
    return messages


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, taint["effect"]) or toleration.get("key") not in (None, taint["key"]):
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")


def packing_order(objects: list[Object], pods: list[Object]) -> list[str]:
    """The parts of a data set are all there before they are made one."""
    messages = []
    for tree in of_kind(objects, "JobSet"):
        first, *rest = tree["spec"]["replicatedJobs"]
        for job in rest:
            if {"name": first["name"], "status": "Complete"} not in job.get("dependsOn", []):
                messages.append(f"{name_of(tree)}: {job['name']} does not wait until {first['name']} is complete")
    return messages


def expressions(objects: list[Object], pods: list[Object]) -> list[str]:
    """PromQL parses, and every selector is of the namespace where the trainings are."""
    messages = []
    for tree in of_kind(objects, "PrometheusRule"):
        for rule in [rule for group in tree["spec"]["groups"] for rule in group["rules"]]:
            name = f"{name_of(tree)}: {rule.get('alert', rule.get('record'))}"
            try:
                promql_parser.parse(rule["expr"])
            except ValueError as error:
                messages.append(f"{name}: {error}")
                continue
            selectors = re.findall(r"\b(?:warm_dist_\w+|up)\b(\{[^}]*\})?", rule["expr"])
            inside = f'namespace="{tree["metadata"].get("namespace")}"'
            if any(inside not in selector for selector in selectors):
                messages.append(f"{name}: a selector without {inside}")
    return messages


def one_endpoint(objects: list[Object], pods: list[Object]) -> list[str]:
    """A PodMonitor reads rank 0's pod of a training: the others would be down for ever."""
    messages = []
    for tree in of_kind(objects, "PodMonitor"):
        for training in trainings(objects, pods):
            chosen = [
                pod["metadata"]["name"]
                for pod in training.pods
                if selects(tree["spec"]["selector"], pod["metadata"]["labels"])
            ]
            if len(chosen) != 1 or not re.search(r"-0-0$", chosen[0]):
                messages.append(f"{name_of(tree)}: reads {len(chosen)} pods of {training.name}, not the first alone")
    return messages


def budgets(objects: list[Object], pods: list[Object]) -> list[str]:
    """A PodDisruptionBudget lets one pod go: else no node with it can be drained."""
    messages = []
    for tree in of_kind(objects, "PodDisruptionBudget"):
        count = sum(selects(tree["spec"]["selector"], pod["metadata"]["labels"]) for pod in pods)
        least = tree["spec"].get("minAvailable", count - tree["spec"].get("maxUnavailable", 0))
        if least >= count:
            messages.append(f"{name_of(tree)}: lets none of {count} pods go")
    return messages


def own_credentials(objects: list[Object], pods: list[Object]) -> list[str]:
    """Pods that speak to S3 never fall back to the credentials of their node."""
    messages = []
    for tree in of_kind(objects, "ConfigMap"):
        if "AWS_DEFAULT_REGION" in tree.get("data", {}) and tree["data"].get("AWS_EC2_METADATA_DISABLED") != "true":
            messages.append(f"{name_of(tree)}: AWS_EC2_METADATA_DISABLED is not true")
    return messages


def canonical(objects: list[Object], pods: list[Object]) -> list[str]:
    """A TrainJob's quantities are as Kubernetes itself writes them: a controller that sends it back would change what never changes."""
    messages = []
    for tree in of_kind(objects, "TrainJob"):
        assert QUEUE in tree["metadata"]["labels"]
        resources = tree["spec"]["trainer"]["resourcesPerNode"]
        for value in [value for kind in ("requests", "limits") for value in resources.get(kind, {}).values()]:
            if _canonical(value) != value:
                messages.append(f"{name_of(tree)}: {value!r} is {_canonical(value)!r} after the first update")
    return messages


def _canonical(value: Any) -> str:
    """The largest unit that leaves a whole number, with the suffixes of its own family."""
    found = re.fullmatch(r"(\d+)(m|[KMGTP]i|)", str(value))
    if not found:
        return f"unknown {value}"
    number, suffix = int(found[1]), found[2]
    if suffix == "m":
        return str(number // 1000) if number % 1000 == 0 else f"{number}m"
    while suffix in BINARY[:-1] and number % 1024 == 0:
        number, suffix = number // 1024, BINARY[BINARY.index(suffix) + 1]
    if not suffix and number % 1000 == 0 and number:
        return f"{number // 1000}k"
    return f"{number}{suffix}"
