"""Small questions about objects that many checks ask."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

from tests.k8s.render import Object

T = TypeVar("T")
GPU, COMPONENT, OWNER = "nvidia.com/gpu", "app.kubernetes.io/component", "owner"
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def once(function: Callable[..., T]) -> Callable[..., T]:
    """Remember answers by the identity of the objects: nobody changes them, and most lie in many worlds."""
    known: dict[tuple[int, ...], tuple[tuple[Object, ...], T]] = {}

    @functools.wraps(function)
    def ask(*trees: Object) -> T:
        key = tuple(map(id, trees))
        if key not in known:
            known[key] = trees, function(*trees)  # the objects are kept: else others could get their numbers
        return known[key][1]

    return ask


def quantity(value: Any) -> float:
    """A Kubernetes quantity as a number: "500m", "16Gi", 8."""
    found = re.fullmatch(r"([0-9.]+)(m|k|[MGT]i?|Ki|)", str(value))
    assert found, f"{value!r} is no quantity"
    return float(found[1]) * UNITS[found[2]]


def name_of(tree: Object) -> str:
    """Kind/name, as messages say it."""
    return f"{tree['kind']}/{tree['metadata']['name']}"


def space_of(tree: Object) -> str:
    return str(tree["metadata"].get("namespace", ""))


def labels(tree: Object) -> dict[str, str]:
    return dict(tree["metadata"].get("labels", {}))


def component(pod: Object) -> str:
    return labels(pod).get(COMPONENT, "")


def owner(pod: Object) -> str:
    """Kind/name of the object that a person wrote."""
    return str(pod["metadata"]["annotations"][OWNER])


def find(objects: list[Object], kind: str, name: str, namespace: str = "") -> Object | None:
    """The one of that name, or None. namespace: empty for a kind of the whole cluster."""
    same = [tree for tree in objects if tree["kind"] == kind and tree["metadata"]["name"] == name]
    return next((tree for tree in same if not namespace or space_of(tree) == namespace), None)


def containers(pod: Object) -> list[Object]:
    """All of a pod's, those that come first first."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def variables(container: Object) -> dict[str, str]:
    """Those whose values are written out."""
    return {item["name"]: item["value"] for item in container.get("env", []) if "value" in item}


def port_number(pod: Object, port: Any) -> int | None:
    """A container port by its number or its name, if the pod has it."""
    every = [item for container in containers(pod) for item in container.get("ports", [])]
    return next((item["containerPort"] for item in every if port in (item.get("name"), item["containerPort"])), None)


def selects(selector: Object | None, given: dict[str, str]) -> bool:
    """A label selector's verdict; None selects nothing, {} everything."""
    if selector is None:
        return False
    wanted = [(key, [value]) for key, value in selector.get("matchLabels", {}).items()]
    for item in selector.get("matchExpressions", []):
        assert item["operator"] == "In"
        wanted.append((item["key"], item["values"]))
    return all(given.get(key) in values for key, values in wanted)
