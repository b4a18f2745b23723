"""What lies in one cluster together, and the register of checks: each looks at a world and yields what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tests.k8s.expand import expand
from tests.k8s.objects import containers, find, name_of, owner, selects, space_of
from tests.k8s.render import Object


class World:
    """Objects and their pods. sets: the equal pods of a template, which differ by their index alone. kinds: one of each set."""

    def __init__(self, objects: list[Object]) -> None:
        self.objects, self.pods = objects, expand(objects)
        found: dict[tuple[str, str], list[Object]] = {}
        for pod in self.pods:
            found.setdefault((owner(pod), re.sub(r"(-\d+)+$", "", pod["metadata"]["name"])), []).append(pod)
        self.sets = list(found.values())
        self.kinds = [pods[0] for pods in self.sets]

    def of_kind(self, *kinds: str) -> list[Object]:
        return [tree for tree in self.objects if tree["kind"] in kinds]

    def find(self, kind: str, name: str, namespace: str = "") -> Object | None:
        return find(self.objects, kind, name, namespace)

    def containers(self) -> Iterator[tuple[str, Object, Object]]:
        """(what messages call it, container, its pod) of one pod of each set."""
        for pod in self.kinds:
            for container in containers(pod):
                yield f"{owner(pod)}: {container['name']}", container, pod

    def made_by(self, tree: Object) -> list[list[Object]]:
        """The sets of pods of an object."""
        return [pods for pods in self.sets if owner(pods[0]) == name_of(tree) and space_of(pods[0]) == space_of(tree)]

    def selected(self, tree: Object, selector: Object) -> list[Object]:
        """The pods in an object's namespace that a selector means."""
        mine = [pod for pod in self.pods if space_of(pod) == space_of(tree)]
        return [pod for pod in mine if selects(selector, pod["metadata"]["labels"])]


Check = Callable[[World], Iterator[str]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check by its name."""
    CHECKS[function.__name__] = function
    return function


def findings(world: World) -> dict[str, list[str]]:
    """Check → what it has to say, those without a message left out."""
    found = {name: list(dict.fromkeys(look(world))) for name, look in CHECKS.items()}
    return {name: messages for name, messages in found.items() if messages}
