"""Small questions about objects that many checks ask."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.render import Object

QUEUE = "kueue.x-k8s.io/queue-name"
COMPONENT = "app.kubernetes.io/component"
SUFFIXES = {
    "": 1,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def quantity(value: Any) -> float:
    """A Kubernetes quantity as a number: "500m", "16Gi", 8."""
    found = re.fullmatch(r"([0-9.]+)(m|k|[MGT]i?|Ki|)", str(value))
    if not found:
        raise ValueError(f"{value!r} is no quantity")
    return float(found[1]) * SUFFIXES[found[2]]


def name_of(tree: Object) -> str:
    """Kind/name, as messages say it."""
    return f"{tree['kind']}/{tree['metadata']['name']}"


def space_of(tree: Object) -> str:
    return str(tree["metadata"].get("namespace", ""))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [tree for tree in objects if tree["kind"] in kinds]


def find(objects: list[Object], kind: str, name: str, namespace: str = "") -> Object | None:
    """The one of that name, or None. namespace: empty for a kind of the whole cluster."""
    same = [tree for tree in of_kind(objects, kind) if tree["metadata"]["name"] == name]
    return next((tree for tree in same if not namespace or space_of(tree) == namespace), None)


def containers(pod: Object) -> list[Object]:
    """All of a pod's, those that come first first."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def owner(pod: Object) -> str:
    """Kind/name of the object that a person wrote."""
    reference = pod["metadata"]["ownerReferences"][0]
    return f"{reference['kind']}/{reference['name']}"


def component(pod: Object) -> str:
    return str(pod["metadata"].get("labels", {}).get(COMPONENT, ""))


def distinct(pods: list[Object]) -> list[Object]:
    """One pod of every template: those of one job differ by their index alone."""
    seen: dict[tuple[str, str], Object] = {}
    for pod in pods:
        seen.setdefault((owner(pod), re.sub(r"(-\d+)+$", "", pod["metadata"]["name"])), pod)
    return list(seen.values())


def selects(selector: Object | None, labels: dict[str, str]) -> bool:
    """A label selector's verdict; None selects nothing, {} everything."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    return all(_expression(item, labels) for item in selector.get("matchExpressions", []))


def _expression(item: Object, labels: dict[str, str]) -> bool:
    value, values = labels.get(item["key"]), item.get("values", [])
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[item["operator"]]


def port_number(pod: Object, port: Any) -> int | None:
    """A container port by its number or its name, if the pod has it."""
    for container in containers(pod):
        for item in container.get("ports", []):
            if port in (item.get("name"), item["containerPort"]):
                return int(item["containerPort"])
    return None


def templates(tree: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    """Every pod template inside an object, whatever its kind, with its path."""
    if isinstance(tree, dict):
        if isinstance(tree.get("containers"), list) and path.endswith("spec"):
            yield path, tree
        for key, value in tree.items():
            yield from templates(value, f"{path}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for number, item in enumerate(tree):
            yield from templates(item, f"{path}.{number}")
