"""What an API server does to a custom resource: the CRD's defaults, its schema in strict mode, and its CEL rules.

The CRDs are JSON files in the folder $K8S_CRDS, one a file, each `kubectl get crd NAME -o json`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import jsonschema

from tests.k8s.objects import once, space_of
from tests.k8s.render import Object, lacks

METADATA = ("name", "namespace", "labels", "annotations", "finalizers", "generateName", "ownerReferences")
Errors = Iterator[jsonschema.ValidationError]


@functools.cache
def crds() -> dict[tuple[str, str], Object]:
    """(group, kind) → the CRD."""
    folder = os.environ.get("K8S_CRDS")
    every = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")] if folder else []
    return {(crd["spec"]["group"], crd["spec"]["names"]["kind"]): crd for crd in every}


def need_crds() -> None:
    """Skip, loudly, without the CRDs; in CI fail."""
    if not crds():
        lacks(
            f"NO CUSTOM RESOURCE WAS CHECKED: K8S_CRDS={os.environ.get('K8S_CRDS', '')!r}; set it to a folder that has each CRD as "
            "NAME.json, of `kubectl get crd NAME -o json` from a cluster with the operators of k8s/README.md"
        )


def is_custom(tree: Object) -> bool:
    """Whether a CRD defines this kind: its group is neither core nor one of Kubernetes' own."""
    group = tree["apiVersion"].rpartition("/")[0]
    return group.endswith(".x-k8s.io") or ("." in group and not group.endswith(".k8s.io"))


@once
def problems(tree: Object) -> list[str]:
    """Everything an API server would hold against a custom resource that is created."""
    group, _, version = tree["apiVersion"].rpartition("/")
    crd = crds().get((group, tree["kind"]))
    if crd is None:
        return [f"no CRD of $K8S_CRDS defines {tree['apiVersion']} {tree['kind']}"]
    schemas = {item["name"]: item["schema"]["openAPIV3Schema"] for item in crd["spec"]["versions"] if item["served"]}
    if version not in schemas:
        return [f"{crd['metadata']['name']} is not served as {version}"]
    metadata = {"type": "object", "properties": {key: {} for key in METADATA}}
    schema = schemas[version] | {"properties": schemas[version]["properties"] | {"metadata": metadata}}
    whole = copy.deepcopy(tree)
    default(schema, whole)
    errors = Validator(schema).iter_errors(whole)
    found = [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors]
    if bool(space_of(tree)) != (crd["spec"]["scope"] == "Namespaced"):
        found.append(f"its scope is {crd['spec']['scope']}, its namespace {space_of(tree)!r}")
    return found


def default(schema: Object, tree: Any) -> None:
    """Fill in the schema's defaults, as the API server does before it validates."""
    if isinstance(tree, dict):
        for key, inner in schema.get("properties", {}).items():
            if key not in tree and "default" in inner:
                tree[key] = copy.deepcopy(inner["default"])
            if key in tree:
                default(inner, tree[key])
    elif isinstance(tree, list):
        for item in tree:
            default(schema.get("items", {}), item)


def _type(validator: Any, kind: str, tree: Any, schema: Object) -> Errors:
    """As in JSON Schema, but null may be allowed, and a field that would be pruned is an error."""
    if tree is None and schema.get("nullable"):
        return
    yield from jsonschema.Draft202012Validator.VALIDATORS["type"](validator, kind, tree, schema)
    free = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if kind == "object" and isinstance(tree, dict) and not free:
        for key in sorted(tree.keys() - schema.get("properties", {}).keys()):
            yield jsonschema.ValidationError(f"unknown field {key}")


def _unique(validator: Any, kind: str, tree: Any, schema: Object) -> Errors:
    """Sets and maps have each item once."""
    if kind in ("set", "map") and isinstance(tree, list):
        keys = schema.get("x-kubernetes-list-map-keys", [])
        names = [json.dumps([item.get(key) for key in keys] if kind == "map" else item) for item in tree]
        yield from (
            jsonschema.ValidationError(f"{name} stands twice") for name in {n for n in names if names.count(n) > 1}
        )


def _rules(validator: Any, rules: list[Object], tree: Any, schema: Object) -> Errors:
    yield from (jsonschema.ValidationError(text) for rule in rules if (text := broken(rule, tree)))


Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"type": _type, "x-kubernetes-list-type": _unique, "x-kubernetes-validations": _rules},
)


def broken(rule: Object, tree: Any) -> str:
    """Why a CEL rule refuses the value; empty if it accepts, or speaks of changes (oldSelf) only.

    A rule that cannot be evaluated refuses: the API server does so where a field lacks, and we must not pass what we cannot read.
    """
    if "oldSelf" in rule["rule"] and not rule.get("optionalOldSelf"):
        return ""
    try:
        verdict = _program(rule["rule"]).evaluate({"self": celpy.json_to_cel(tree)})
    except (celpy.CELEvalError, celpy.CELParseError, TypeError, ValueError, KeyError) as error:
        return f"rule cannot be evaluated ({error.args[:1]}): {rule['rule']}"
    return "" if bool(verdict) else str(rule.get("message") or f"rule {rule['rule']}")


@functools.cache
def _program(text: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(text))
