"""The JobSet that Kubeflow Trainer v2.3 makes of a TrainJob and its runtime.

Source: kubeflow/trainer, pkg/runtime/core/trainingruntime.go (patches), pkg/runtime/framework/plugins/torch/torch.go (PET_*)
and pkg/runtime/framework/plugins/jobset/{jobset,builder}.go (what the TrainJob's trainer overrides).
"""

from __future__ import annotations

import copy
from typing import Any

from tests.k8s.objects import once
from tests.k8s.render import Object

PORT = 29500
INDEX = "batch.kubernetes.io/job-completion-index"
FIELD = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
BY_NAME = ("containers", "initContainers", "env", "volumes", "replicatedJobs")
"""The lists of a PodSpec that our patches have and that are merged by name; other lists, tolerations among them, are replaced whole."""


def merge(tree: Any, patch: Any, name: str = "") -> Any:
    """Kubernetes' strategic merge, without its directives."""
    if isinstance(tree, dict) and isinstance(patch, dict):
        return tree | {key: merge(tree[key], value, key) if key in tree else value for key, value in patch.items()}
    if name in BY_NAME and isinstance(tree, list):
        changed = {item["name"]: item for item in patch}
        return [merge(item, changed.pop(item["name"], {})) for item in tree] + list(changed.values())
    return patch


def patches(trainjob: Object) -> list[Object]:
    """The replicated jobs of all runtime patches, in their order."""
    specs = [patch["trainingRuntimeSpec"]["template"]["spec"] for patch in trainjob["spec"].get("runtimePatches", [])]
    return [job for spec in specs for job in spec["replicatedJobs"]]


@once
def jobset_of(trainjob: Object, runtime: Object) -> Object:
    """What Trainer creates: the runtime's one job, patched, its container `node` overridden, PET_* added."""
    name, trainer, template = trainjob["metadata"]["name"], trainjob["spec"]["trainer"], runtime["spec"]["template"]
    (job,) = template["spec"]["replicatedJobs"]
    for patch in patches(trainjob):
        job = merge(job, patch) if patch["name"] == job["name"] else job
    job = copy.deepcopy(job) | {"replicas": 1}
    spec = job["template"]["spec"]
    spec["parallelism"] = spec["completions"] = trainer["numNodes"]
    (node,) = [item for item in spec["template"]["spec"]["containers"] if item["name"] == "node"]
    if trainer["resourcesPerNode"]:
        node["resources"] = trainer["resourcesPerNode"]
    env = {
        "PET_NNODES": {"value": str(trainer["numNodes"])},
        "PET_NPROC_PER_NODE": {"value": str(trainer["numProcPerNode"])},
        "PET_NODE_RANK": {"valueFrom": FIELD},
        "PET_MASTER_ADDR": {"value": f"{name}-node-0-0.{name}"},
        "PET_MASTER_PORT": {"value": str(PORT)},
    }
    more = [*trainer.get("env", []), *({"name": key, **value} for key, value in env.items())]
    node["env"] = merge(node.get("env", []), more, "env")
    node["ports"] = [*node.get("ports", []), {"containerPort": PORT}]
    metadata = {"name": name, "namespace": trainjob["metadata"]["namespace"]}
    whole = {**template["spec"], "suspend": trainjob["spec"].get("suspend", False), "replicatedJobs": [job]}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": whole}
