"""Every object is one that an API server of Kubernetes 1.37 with the operators' CRDs would take."""

from __future__ import annotations

import functools
import json

import kubernetes_validate

from tests.k8s import crds
from tests.k8s.objects import distinct, name_of, owner, space_of, templates
from tests.k8s.render import Object

VERSION = "1.37"
CLUSTER = {
    "Namespace",
    "PersistentVolume",
    "ClusterRole",
    "ClusterRoleBinding",
    "StorageClass",
    "PriorityClass",
    "RuntimeClass",
    "CustomResourceDefinition",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}
NAMESPACED = {
    "ConfigMap",
    "CronJob",
    "DaemonSet",
    "Deployment",
    "Ingress",
    "Job",
    "LimitRange",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "Pod",
    "PodDisruptionBudget",
    "ResourceQuota",
    "Role",
    "RoleBinding",
    "Secret",
    "Service",
    "ServiceAccount",
    "StatefulSet",
}


@functools.cache
def _core(text: str) -> str:
    """What is wrong with an object of a core kind; empty if nothing. Its text: the same object is in many worlds."""
    try:
        kubernetes_validate.validate(json.loads(text), VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message[:300]}"
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        return str(error.message)
    return ""


def core_schema(objects: list[Object], pods: list[Object]) -> list[str]:
    """Core kinds by Kubernetes' own schemas, strictly; the expanded pods too, which is all of a custom resource's template."""
    messages = [
        (name_of(tree), _core(json.dumps(tree, sort_keys=True))) for tree in objects if not crds.is_custom(tree)
    ]
    messages += [(owner(pod), _core(json.dumps(pod, sort_keys=True))) for pod in distinct(pods)]
    return [f"{name}: {text}" for name, text in messages if text]


def custom_schema(objects: list[Object], pods: list[Object]) -> list[str]:
    """Custom resources by their CRD: its schema without unknown fields, and its CEL rules."""
    return [f"{name_of(tree)}: {text}" for tree in objects if crds.is_custom(tree) for text in crds.check(tree)]


def scope(objects: list[Object], pods: list[Object]) -> list[str]:
    """What is the whole cluster's has no namespace, everything else has one."""
    messages = []
    for tree in objects:
        kind = tree["kind"]
        crd = crds.crd_of(tree) if crds.is_custom(tree) else None
        cluster = crd["spec"]["scope"] == "Cluster" if crd else kind in CLUSTER
        if crd is None and kind not in CLUSTER | NAMESPACED:
            messages.append(f"{name_of(tree)}: whether {tree['apiVersion']} {kind} has a namespace is not known here")
        elif cluster and space_of(tree):
            messages.append(f"{name_of(tree)}: is the whole cluster's, a namespace {space_of(tree)} is refused")
        elif not cluster and not space_of(tree):
            messages.append(f"{name_of(tree)}: has no namespace")
    return messages


def expanded(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every object with a pod template has pods here: of those that had none, no check would see anything."""
    makers = {owner(pod) for pod in pods}
    return [
        f"{name_of(tree)}: no pod comes of it"
        for tree in objects
        if tree["kind"] not in ("TrainingRuntime", "TrainJob") and any(templates(tree)) and name_of(tree) not in makers
    ]
