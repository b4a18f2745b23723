"""The pods that controllers make of objects, as plain Pods.

Names have no random part: NAME-INDEX for Jobs and sets, JOBSET-REPLICATEDJOB-JOB-INDEX for JobSets. An annotation names the
object that a person wrote, not the one that a controller put between.
"""

from __future__ import annotations

import copy
import re

from tests.k8s.objects import OWNER, containers, find, name_of, once, space_of
from tests.k8s.render import Object
from tests.k8s.trainer import FIELD, INDEX, jobset_of, merge

SMALL = {"requests": {"cpu": "500m", "memory": "200Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
"""Of the container with which KubeRay submits a RayJob that has no submitterPodTemplate."""


def expand(objects: list[Object]) -> list[Object]:
    """All pods of all objects, to look at. A TrainJob whose runtime is not among the objects has none."""
    pods: list[Object] = []
    for tree in objects:
        if tree["kind"] in MAKERS:
            pods += _made(tree)
        elif tree["kind"] == "TrainJob" and (runtime := runtime_of(objects, tree)):
            pods += _trained(tree, runtime)
    return pods


def runtime_of(objects: list[Object], trainjob: Object) -> Object | None:
    """The runtime that a TrainJob names, if it is there."""
    reference = trainjob["spec"]["runtimeRef"]
    return find(objects, reference.get("kind", "ClusterTrainingRuntime"), reference["name"], space_of(trainjob))


@once
def _made(tree: Object) -> list[Object]:
    return MAKERS[tree["kind"]](tree, tree)


@once
def _trained(tree: Object, runtime: Object) -> list[Object]:
    return _jobset(jobset_of(tree, runtime), tree)


def _pod(name: str, template: Object, owner: Object, more: Object) -> Object:
    """A copy of a template. more: labels that its controller adds."""
    labels = {**template.get("metadata", {}).get("labels", {}), **more}
    metadata = {"name": name, "namespace": space_of(owner), "labels": labels, "annotations": {OWNER: name_of(owner)}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": copy.deepcopy(template["spec"])}


def _replicas(tree: Object, owner: Object) -> list[Object]:
    name, spec = tree["metadata"]["name"], tree["spec"]
    pods = [_pod(f"{name}-{number}", spec["template"], owner, {}) for number in range(spec.get("replicas", 1))]
    for pod in pods:
        for claim in [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])]:
            volume = {"name": claim, "persistentVolumeClaim": {"claimName": f"{claim}-{pod['metadata']['name']}"}}
            pod["spec"]["volumes"] = [*pod["spec"].get("volumes", []), volume]
    return pods


def _job(tree: Object, owner: Object) -> list[Object]:
    """Its pods; those of an Indexed one have their index as label, host name and variable."""
    spec, name, pods = tree["spec"], tree["metadata"]["name"], []
    indexed = spec.get("completionMode") == "Indexed"
    for number in map(str, range(spec.get("completions", 1))):
        pods.append(_pod(f"{name}-{number}", spec["template"], owner, {INDEX: number} if indexed else {}))
        for container in containers(pods[-1]) if indexed else []:
            pods[-1]["spec"]["hostname"] = f"{name}-{number}"
            env = merge(container.get("env", []), [{"name": "JOB_COMPLETION_INDEX", "valueFrom": FIELD}], "env")
            container["env"] = [{"name": e["name"], "value": number} if e.get("valueFrom") == FIELD else e for e in env]
    return pods


def _jobset(tree: Object, owner: Object) -> list[Object]:
    """With what JobSet's webhook fills in: Indexed, restartPolicy OnFailure, a subdomain named as the set."""
    name, network, pods = tree["metadata"]["name"], tree["spec"].get("network", {}), []
    for job in tree["spec"]["replicatedJobs"]:
        spec = {"completionMode": "Indexed", **job["template"]["spec"]}
        for pod in _job({"metadata": {"name": f"{name}-{job['name']}-0"}, "spec": spec}, owner):
            pod["spec"].setdefault("restartPolicy", "OnFailure")
            if network.get("enableDNSHostnames", True):
                pod["spec"]["subdomain"] = network.get("subdomain", name)
            pods.append(pod)
    return pods


def _ray(tree: Object, owner: Object) -> list[Object]:
    """The head, the workers and the pod that submits, with the token."""
    name, spec = tree["metadata"]["name"], tree["spec"]
    cluster = spec["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]
    pods = [_pod(f"{name}-head", head, owner, {"ray.io/node-type": "head"})]
    for group in cluster["workerGroupSpecs"]:
        for number in range(group["replicas"]):
            worker = f"{name}-{group['groupName']}-worker-{number}"
            pods.append(_pod(worker, group["template"], owner, {"ray.io/node-type": "worker"}))
    image = head["spec"]["containers"][0]["image"]
    own = {"restartPolicy": "Never", "containers": [{"name": "ray-job-submitter", "image": image, "resources": SMALL}]}
    pods.append(_pod(f"{name}-submitter", spec.get("submitterPodTemplate", {"spec": own}), owner, {}))
    auth = cluster.get("authOptions", {})
    if auth.get("mode") == "token":
        secret = {"secretKeyRef": {"name": auth.get("secretName", name), "key": "auth_token"}}
        env = [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": secret}]
        for pod in pods:
            first = pod["spec"]["containers"][0]
            first["env"] = merge(first.get("env", []), env, "env")
    return pods


MAKERS = {"Deployment": _replicas, "StatefulSet": _replicas, "Job": _job, "JobSet": _jobset, "RayJob": _ray}


def substitute(text: str, values: dict[str, str]) -> str:
    """$(NAME) → its value, as a kubelet does (third_party/forked/golang/expansion); an unknown name stays, $$ is $."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda it: "$" if it[0] == "$$" else values.get(it[1], it[0]), text)
