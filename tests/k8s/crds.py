"""What an API server does to a custom resource: the CRD's schema in strict mode, its defaults, and then its CEL rules.

The CRDs are JSON files in the folder $K8S_CRDS, one a file, each `kubectl get crd NAME -o json`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.k8s.render import Object

NEEDED = (
    "clusterqueues.kueue.x-k8s.io",
    "jobsets.jobset.x-k8s.io",
    "localqueues.kueue.x-k8s.io",
    "podmonitors.monitoring.coreos.com",
    "prometheusrules.monitoring.coreos.com",
    "rayjobs.ray.io",
    "resourceflavors.kueue.x-k8s.io",
    "topologies.kueue.x-k8s.io",
    "trainingruntimes.trainer.kubeflow.org",
    "trainjobs.trainer.kubeflow.org",
    "workloadpriorityclasses.kueue.x-k8s.io",
)
METADATA = {"name", "namespace", "labels", "annotations", "finalizers", "generateName", "ownerReferences"}
RESERVED = "true false null in as break const continue else for function if import let loop package namespace return var void while"


def lacking() -> list[str]:
    """The CRDs that $K8S_CRDS has not."""
    folder = os.environ.get("K8S_CRDS", "")
    return [name for name in NEEDED if not folder or not (Path(folder) / f"{name}.json").is_file()]


def need_crds() -> None:
    """Skip, loudly, without the CRDs; in CI fail."""
    if not lacking():
        return
    text = (
        f"NO CUSTOM RESOURCE WAS CHECKED: K8S_CRDS={os.environ.get('K8S_CRDS', '')!r} lacks {', '.join(lacking())}; set it to a folder that has each "
        "as NAME.json, of `kubectl get crd NAME -o json` from a cluster with the operators of k8s/README.md"
    )
    pytest.fail(text) if os.environ.get("CI") == "true" else pytest.skip(text)


@functools.cache
def crds() -> dict[tuple[str, str], dict[str, Any]]:
    """(group, kind) → the CRD."""
    found = {}
    for path in sorted(Path(os.environ["K8S_CRDS"]).glob("*.json")):
        crd = json.loads(path.read_text())
        found[crd["spec"]["group"], crd["spec"]["names"]["kind"]] = crd
    return found


def group_of(tree: Object) -> str:
    """The API group, empty for the core one."""
    return str(tree.get("apiVersion", "")).rpartition("/")[0]


def is_custom(tree: Object) -> bool:
    """Whether a CRD defines this kind: its group is neither core nor one of Kubernetes' own."""
    group = group_of(tree)
    return ("." in group and not group.endswith(".k8s.io")) or group.endswith(".x-k8s.io")


def crd_of(tree: Object) -> dict[str, Any] | None:
    return crds().get((group_of(tree), str(tree.get("kind"))))


def check(tree: Object) -> list[str]:
    """Everything an API server would hold against a custom resource that is created."""
    crd = crd_of(tree)
    if crd is None:
        return [f"no CRD of $K8S_CRDS defines {tree.get('apiVersion')} {tree.get('kind')}"]
    version = tree["apiVersion"].rpartition("/")[2]
    if version not in {v["name"] for v in crd["spec"]["versions"] if v["served"]}:
        return [f"{crd['metadata']['name']} is not served as {version}"]
    return _check(crd["metadata"]["name"], version, json.dumps(tree, sort_keys=True))


@functools.cache
def _check(name: str, version: str, text: str) -> list[str]:
    (crd,) = [crd for crd in crds().values() if crd["metadata"]["name"] == name]
    (found,) = [v for v in crd["spec"]["versions"] if v["name"] == version]
    schema, tree = found["schema"]["openAPIV3Schema"], json.loads(text)
    messages = [f"metadata.{key}: unknown field" for key in sorted(tree.get("metadata", {}).keys() - METADATA)]
    default(schema, tree)
    messages += [_tell(error) for error in _validator(name, version).iter_errors(tree)]
    if not messages:  # as the API server does: rules may rely on the schema
        _walk(schema, tree, "", messages)
    return messages


def _tell(error: jsonschema.ValidationError) -> str:
    path = ".".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        extra = sorted(error.instance.keys() - error.schema.get("properties", {}).keys())
        return f"{path}: unknown field {', '.join(extra)}"
    return f"{path}: {error.message[:300]}"


@functools.cache
def _validator(name: str, version: str) -> Any:
    (crd,) = [crd for crd in crds().values() if crd["metadata"]["name"] == name]
    (found,) = [v for v in crd["spec"]["versions"] if v["name"] == version]
    return jsonschema.Draft202012Validator(_strict(found["schema"]["openAPIV3Schema"], root=True))


def _strict(schema: dict[str, Any], root: bool = False) -> dict[str, Any]:
    """A structural schema as JSON Schema in which every field that would be pruned is an error."""
    out = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key != "default"}
    if "properties" in out:
        out["properties"] = {key: _strict(value) for key, value in out["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(out.get(key), dict):
            out[key] = _strict(out[key])
    if root or schema.get("x-kubernetes-embedded-resource"):
        metadata = {"type": "object"}
        out["properties"] = {"apiVersion": {}, "kind": {}, **out.get("properties", {}), "metadata": metadata}
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if out.get("type") == "object" and "additionalProperties" not in out:
        out["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
        if "enum" in out:
            out["enum"] = [*out["enum"], None]
    if out.get("format") in ("int32", "int64"):
        bits = int(out["format"][3:]) - 1
        out["minimum"] = max(out.get("minimum", -(2**bits)), -(2**bits))
        out["maximum"] = min(out.get("maximum", 2**bits - 1), 2**bits - 1)
    return out


def default(schema: dict[str, Any], tree: Any) -> None:
    """Fill in the schema's defaults, as the API server does before it validates."""
    if isinstance(tree, dict):
        for key, inner in schema.get("properties", {}).items():
            if "default" in inner and (key not in tree or (tree[key] is None and not inner.get("nullable"))):
                tree[key] = copy.deepcopy(inner["default"])
            if key in tree:
                default(inner, tree[key])
        rest = schema.get("additionalProperties")
        if isinstance(rest, dict):
            for key in tree.keys() - schema.get("properties", {}).keys():
                default(rest, tree[key])
    elif isinstance(tree, list):
        for item in tree:
            default(schema.get("items", {}), item)


def _walk(schema: dict[str, Any], tree: Any, path: str, messages: list[str]) -> None:
    """The rules of every place that the object has, and the uniqueness of its sets and maps."""
    if tree is None:
        return
    messages += [
        f"{path}: {text}" for rule in schema.get("x-kubernetes-validations", []) if (text := _broken(rule, tree))
    ]
    if isinstance(tree, dict):
        for key, value in tree.items():
            inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                _walk(inner, value, f"{path}.{key}".lstrip("."), messages)
    elif isinstance(tree, list):
        _unique(schema, tree, path, messages)
        for number, item in enumerate(tree):
            _walk(schema.get("items", {}), item, f"{path}.{number}", messages)


def _unique(schema: dict[str, Any], tree: list[Any], path: str, messages: list[str]) -> None:
    kind, keys = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys", [])
    if kind in ("set", "map"):
        names = [json.dumps([item.get(key) for key in keys] if kind == "map" else item) for item in tree]
        messages += [f"{path}: {name} stands twice" for name in sorted({n for n in names if names.count(n) > 1})]


def _broken(rule: dict[str, Any], tree: Any) -> str:
    """Why a CEL rule refuses the value; empty if it accepts, or speaks of changes (oldSelf) only.

    A rule that cannot be evaluated refuses: the API server does so where a field lacks, and we must not pass what we cannot read.
    """
    if re.search(r"\boldSelf\b", rule["rule"]):
        return "" if not rule.get("optionalOldSelf") else f"rule with optionalOldSelf, not understood: {rule['rule']}"
    import celpy

    try:
        verdict = _program(rule["rule"]).evaluate({"self": celpy.json_to_cel(_escaped(tree, rule["rule"]))})
    except (celpy.CELEvalError, celpy.CELParseError, TypeError, ValueError, KeyError) as error:
        return f"rule cannot be evaluated ({error.args[:1]}): {rule['rule']}"
    return "" if bool(verdict) else str(rule.get("message") or f"rule {rule['rule']}")


@functools.cache
def _program(text: str) -> Any:
    import celpy

    environment = celpy.Environment()
    return environment.program(environment.compile(text))


def _escaped(tree: Any, rule: str) -> Any:
    """Fields by the names that CEL can say, `__namespace__` and `a__dash__b`, where the rule says such a name."""
    if "__" not in rule:
        return tree
    if isinstance(tree, list):
        return [_escaped(item, rule) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {_identifier(key): _escaped(value, rule) for key, value in tree.items()}


def _identifier(key: str) -> str:
    if key in RESERVED.split():
        return f"__{key}__"
    for text, name in (("__", "underscores"), (".", "dot"), ("-", "dash"), ("/", "slash")):
        key = key.replace(text, f"__{name}__")
    return key
