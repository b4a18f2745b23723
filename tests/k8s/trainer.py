"""The JobSet that Kubeflow Trainer v2.3 makes of a TrainJob and its runtime.

Source: kubeflow/trainer, pkg/runtime/core/trainingruntime.go (patches), pkg/runtime/framework/plugins/torch/torch.go (PET_*)
and pkg/runtime/framework/plugins/jobset/{jobset,builder}.go (what the TrainJob's trainer overrides).
"""

from __future__ import annotations

import copy
from typing import Any

from tests.k8s.objects import quantity
from tests.k8s.render import Object

ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
PORT = 29500
RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
RANK_FIELD = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "topologySpreadConstraints": "topologyKey",
}
"""patchMergeKey of the lists of a PodSpec; every other list, tolerations among them, is replaced whole."""


def merge(tree: Any, patch: Any, name: str = "") -> Any:
    """Kubernetes' strategic merge, without its directives."""
    if isinstance(tree, dict) and isinstance(patch, dict):
        out = dict(tree)
        for key, value in patch.items():
            out[key] = merge(tree[key], value, key) if key in tree else copy.deepcopy(value)
        return out
    key = MERGE_KEYS.get(name)
    if key and isinstance(tree, list) and isinstance(patch, list):
        changed = {item[key]: item for item in patch}
        merged = [merge(item, changed.pop(item[key])) if item[key] in changed else item for item in tree]
        return merged + copy.deepcopy(list(changed.values()))
    return copy.deepcopy(patch)


def upsert(env: list[Object], new: list[Object]) -> None:
    """Variables by name: those that exist are replaced where they stand."""
    places = {item["name"]: number for number, item in enumerate(env)}
    for item in new:
        if item["name"] in places:
            env[places[item["name"]]] = item
        else:
            env.append(item)


def processes_per_node(trainjob: Object, node: Object | None) -> int:
    """The TrainJob's number; without one, the container's GPUs, or else its CPUs."""
    trainer = trainjob["spec"].get("trainer", {})
    if "numProcPerNode" in trainer:
        return int(trainer["numProcPerNode"])
    resources = trainer.get("resourcesPerNode") or (node or {}).get("resources", {})
    every = {**resources.get("limits", {}), **resources.get("requests", {})}
    gpus = sum(int(quantity(value)) for name, value in every.items() if "gpu" in name.lower())
    return gpus or max(1, int(quantity(every.get("cpu", 1))))


def jobset_of(trainjob: Object, runtime: Object) -> Object:
    """What Trainer creates: the runtime's template, patched, with the trainer's container overridden and PET_* added."""
    template = copy.deepcopy(runtime["spec"]["template"])
    policy = runtime["spec"].get("mlPolicy", {})
    jobs = template["spec"]["replicatedJobs"]
    for patch in _patches(trainjob):
        for job in jobs:
            if job["name"] == patch["name"]:
                job["template"] = merge(job["template"], patch.get("template", {}))
    trainer = trainjob["spec"].get("trainer", {})
    nodes = int(trainer.get("numNodes", policy.get("numNodes", 1)))
    for job in jobs:
        spec = job["template"]["spec"]
        if job["template"].get("metadata", {}).get("labels", {}).get(ANCESTOR) == "trainer":
            job["replicas"] = 1
            spec["parallelism"] = spec["completions"] = nodes
            _override(spec["template"]["spec"], trainer)
    if "torch" in policy:
        _torch(trainjob, jobs, nodes, policy["torch"])
    metadata = {"name": trainjob["metadata"]["name"], "namespace": trainjob["metadata"]["namespace"]}
    metadata |= {key: value for key, value in template.get("metadata", {}).items() if key in ("labels", "annotations")}
    spec = {**template["spec"], "suspend": trainjob["spec"].get("suspend", False)}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _patches(trainjob: Object) -> list[Object]:
    """The replicated jobs of all runtime patches, in their order."""
    specs = [patch.get("trainingRuntimeSpec", {}) for patch in trainjob["spec"].get("runtimePatches", [])]
    return [job for spec in specs for job in spec.get("template", {}).get("spec", {}).get("replicatedJobs", [])]


def _override(pod: Object, trainer: Object) -> None:
    for container in pod["containers"]:
        if container["name"] == "node":
            for key in ("image", "command", "args"):
                if key in trainer:
                    container[key] = copy.deepcopy(trainer[key])
            resources = trainer.get("resourcesPerNode") or {}
            if resources.get("limits") or resources.get("requests"):
                container["resources"] = copy.deepcopy(resources)
            upsert(container.setdefault("env", []), copy.deepcopy(trainer.get("env", [])))


def _torch(trainjob: Object, jobs: list[Object], nodes: int, policy: Object) -> None:
    name = trainjob["metadata"]["name"]
    targets = {
        target["jobName"]: target["containerNames"] for target in policy.get("envInjection", {}).get("targets", [])
    }
    for job in jobs:
        pod = job["template"]["spec"]["template"]["spec"]
        is_trainer = job["template"].get("metadata", {}).get("labels", {}).get(ANCESTOR) == "trainer"
        node = next((item for item in pod["containers"] if item["name"] == "node" and is_trainer), None)
        values = {"PET_NNODES": nodes, "PET_NPROC_PER_NODE": processes_per_node(trainjob, node)}
        env: list[Object] = [{"name": key, "value": str(value)} for key, value in values.items()]
        env.append({"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": RANK_FIELD}}})
        env.append({"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"})
        env.append({"name": "PET_MASTER_PORT", "value": str(PORT)})
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            if container is node or container["name"] in targets.get(job["name"], []):
                upsert(container.setdefault("env", []), copy.deepcopy(env))
        if node is not None and PORT not in [port["containerPort"] for port in node.get("ports", [])]:
            node.setdefault("ports", []).append({"containerPort": PORT})
