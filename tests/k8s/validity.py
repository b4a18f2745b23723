"""Every object is one that an API server of Kubernetes 1.37 with the operators' CRDs would take."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import kubernetes_validate

from tests.k8s import crds
from tests.k8s.objects import name_of, once, owner, space_of
from tests.k8s.render import Object
from tests.k8s.world import World, check

VERSION = "1.37"
kubernetes_validate.utils.schema_contents = functools.cache(
    kubernetes_validate.utils.schema_contents
)  # a file an object


@once
def _core(tree: Object) -> str:
    """What is wrong with an object of a core kind; empty if nothing."""
    try:
        kubernetes_validate.validate(tree, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message[:300]}"
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        return str(error.message)
    return ""


@check
def core_schema(world: World) -> Iterator[str]:
    """Core kinds by Kubernetes' own schemas, strictly; the expanded pods too, which is all of a custom resource's template."""
    every = [(name_of(tree), tree) for tree in world.objects if not crds.is_custom(tree)]
    for name, tree in every + [(owner(pod), pod) for pod in world.kinds]:
        if text := _core(tree):
            yield f"{name}: {text}"
        if bool(space_of(tree)) == (tree["kind"] == "Namespace"):
            yield f"{name}: its namespace is {space_of(tree)!r}"


@check
def custom_schema(world: World) -> Iterator[str]:
    """Custom resources by their CRD: its schema without unknown fields, its CEL rules, its scope."""
    for tree in world.objects:
        if crds.crds() and crds.is_custom(tree):
            yield from (f"{name_of(tree)}: {text}" for text in crds.problems(tree))


@check
def names(world: World) -> Iterator[str]:
    """No two objects of one kind and name in one namespace: the second would replace the first."""
    every = [(name_of(tree), space_of(tree)) for tree in world.objects]
    for name, space in sorted({one for one in every if every.count(one) > 1}):
        yield f"{name}: stands twice in {space or 'the cluster'}"


@once
def _templated(tree: Object) -> bool:
    return '"containers"' in json.dumps(tree)


@check
def expanded(world: World) -> Iterator[str]:
    """Every object with a pod template has pods here: of one that had none, no check would see anything."""
    for tree in world.objects:
        if _templated(tree) and tree["kind"] not in ("TrainingRuntime", "TrainJob") and not world.made_by(tree):
            yield f"{name_of(tree)}: no pod comes of it"
