"""The pods that controllers make of objects, as plain Pods with the environment that a kubelet would give them.

Names have no random part: NAME-INDEX for Jobs and sets, JOBSET-REPLICATEDJOB-JOB-INDEX for JobSets. The first owner reference
is the object that a person wrote, not the one that a controller put between.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from tests.k8s.objects import find, of_kind
from tests.k8s.render import Object
from tests.k8s.trainer import jobset_of, upsert

__all__ = ["expand", "jobset_of"]

INDEX = "batch.kubernetes.io/job-completion-index"
SUBMITTER = {
    "restartPolicy": "Never",
    "containers": [
        {
            "name": "ray-job-submitter",
            "resources": {"requests": {"cpu": "500m", "memory": "200Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        }
    ],
}
"""What KubeRay submits with when the RayJob has no submitterPodTemplate; its image is the head's."""


def expand(objects: list[Object]) -> list[Object]:
    """All pods of all objects. TrainJobs need their runtime among the objects; one whose runtime is not there has no pods."""
    pods: list[Object] = []
    for tree in objects:
        make = {
            "Deployment": _replicas,
            "StatefulSet": _stateful,
            "Job": _job,
            "CronJob": _cron,
            "JobSet": _jobset,
            "RayJob": _ray,
        }.get(tree["kind"])
        if make is not None:
            pods += make(copy.deepcopy(tree), tree)
    for tree in of_kind(objects, "TrainJob"):
        reference = tree["spec"]["runtimeRef"]
        kind = reference.get("kind", "ClusterTrainingRuntime")
        space = tree["metadata"].get("namespace", "") if kind == "TrainingRuntime" else ""
        runtime = find(objects, kind, reference["name"], space)
        if runtime is not None:
            pods += _jobset(jobset_of(tree, runtime), tree)
    for pod in pods:
        _resolve(pod)
    return pods


def _pod(
    name: str, template: Object, owner: Object, labels: Object | None = None, annotations: Object | None = None
) -> Object:
    given = template.get("metadata") or {}
    metadata: Object = {"name": name, "namespace": owner["metadata"].get("namespace", "default")}
    metadata["labels"] = {**given.get("labels", {}), **(labels or {})}
    metadata["annotations"] = {**given.get("annotations", {}), **(annotations or {})}
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": "0",
    }
    metadata["ownerReferences"] = [reference]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": copy.deepcopy(template["spec"])}


def _replicas(tree: Object, owner: Object) -> list[Object]:
    name, count = tree["metadata"]["name"], tree["spec"].get("replicas", 1)
    return [_pod(f"{name}-{number}", tree["spec"]["template"], owner) for number in range(count)]


def _stateful(tree: Object, owner: Object) -> list[Object]:
    pods = _replicas(tree, owner)
    for number, pod in enumerate(pods):
        name, spec = pod["metadata"]["name"], pod["spec"]
        pod["metadata"]["labels"] |= {
            "statefulset.kubernetes.io/pod-name": name,
            "apps.kubernetes.io/pod-index": str(number),
        }
        spec |= {"hostname": name, "subdomain": tree["spec"].get("serviceName", "")}
        for claim in tree["spec"].get("volumeClaimTemplates", []):
            volume = {"name": claim["metadata"]["name"]}
            volume["persistentVolumeClaim"] = {"claimName": f"{claim['metadata']['name']}-{name}"}
            spec.setdefault("volumes", []).append(volume)
    return pods


def _job(tree: Object, owner: Object) -> list[Object]:
    """Its pods; those of an Indexed one have their index as label, annotation, host name and variable."""
    spec, name = tree["spec"], tree["metadata"]["name"]
    count = spec.get("completions", spec.get("parallelism", 1))
    pods = []
    for number in range(count):
        labels = {"batch.kubernetes.io/job-name": name, "job-name": name}
        indexed = spec.get("completionMode") == "Indexed"
        index = {INDEX: str(number)} if indexed else {}
        pod = _pod(f"{name}-{number}", spec["template"], owner, {**labels, **index}, index)
        if indexed:
            pod["spec"].setdefault("hostname", f"{name}-{number}")
            for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
                field = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
                upsert(container.setdefault("env", []), [{"name": "JOB_COMPLETION_INDEX", "valueFrom": field}])
        pods.append(pod)
    return pods


def _cron(tree: Object, owner: Object) -> list[Object]:
    return _job({"metadata": tree["metadata"], **tree["spec"]["jobTemplate"]}, owner)


def _jobset(tree: Object, owner: Object) -> list[Object]:
    """With what JobSet's webhook fills in: Indexed, restartPolicy OnFailure, a subdomain named as the set."""
    name, network = tree["metadata"]["name"], tree["spec"].get("network", {})
    pods = []
    for replicated in tree["spec"]["replicatedJobs"]:
        for number in range(replicated.get("replicas", 1)):
            job_name = f"{name}-{replicated['name']}-{number}"
            spec = copy.deepcopy(replicated["template"]["spec"])
            spec.setdefault("completionMode", "Indexed")
            keys = {
                "jobset.sigs.k8s.io/jobset-name": name,
                "jobset.sigs.k8s.io/replicatedjob-name": replicated["name"],
                "jobset.sigs.k8s.io/replicatedjob-replicas": str(replicated.get("replicas", 1)),
                "jobset.sigs.k8s.io/job-index": str(number),
                "jobset.sigs.k8s.io/restart-attempt": "0",
            }
            for pod in _job({"metadata": {"name": job_name}, "spec": spec}, owner):
                pod["metadata"]["labels"] |= keys
                pod["metadata"]["annotations"] |= keys
                pod["spec"].setdefault("restartPolicy", "OnFailure")
                if network.get("enableDNSHostnames", True):
                    pod["spec"]["subdomain"] = network.get("subdomain", name)
                pods.append(pod)
    return pods


def _ray(tree: Object, owner: Object) -> list[Object]:
    """The head, the workers and, unless it is submitted by HTTP or a sidecar, the pod that submits."""
    name, spec = tree["metadata"]["name"], tree["spec"]
    cluster = spec["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]
    pods = [_pod(f"{name}-head", head, owner, _ray_labels(name, "head", "headgroup"))]
    for group in cluster.get("workerGroupSpecs", []):
        labels = _ray_labels(name, "worker", group["groupName"])
        for number in range(group.get("replicas", 0) * group.get("numOfHosts", 1)):
            pod = _pod(f"{name}-{group['groupName']}-worker-{number}", group["template"], owner, labels)
            pod["spec"]["initContainers"] = [*pod["spec"].get("initContainers", []), _wait_gcs_ready(pod["spec"])]
            pods.append(pod)
    if spec.get("submissionMode", "K8sJobMode") == "K8sJobMode":
        template = spec.get("submitterPodTemplate") or {"spec": copy.deepcopy(SUBMITTER)}
        template["spec"]["containers"][0].setdefault("image", head["spec"]["containers"][0].get("image"))
        pods.append(_pod(f"{name}-submitter", template, owner, {"job-name": name}))
    auth = cluster.get("authOptions", {})
    if auth.get("mode") == "token":
        secret = {"secretKeyRef": {"name": auth.get("secretName", name), "key": "auth_token"}}
        env = [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": secret}]
        for pod in pods:
            upsert(pod["spec"]["containers"][0].setdefault("env", []), copy.deepcopy(env))
    return pods


def _ray_labels(name: str, kind: str, group: str) -> dict[str, str]:
    return {"ray.io/cluster": name, "ray.io/node-type": kind, "ray.io/group": group, "ray.io/is-ray-node": "yes"}


def _wait_gcs_ready(spec: Object) -> Object:
    """The init container that KubeRay puts into workers, made of the first container's image, mounts and security context."""
    first = spec["containers"][0]
    small = {"cpu": "200m", "memory": "256Mi"}
    init = {"name": "wait-gcs-ready", "image": first.get("image"), "resources": {"requests": small, "limits": small}}
    return {**init, **{key: copy.deepcopy(first[key]) for key in ("securityContext", "volumeMounts") if key in first}}


def _resolve(pod: Object) -> None:
    """Values for fieldRefs that are known before a node is, and for $(NAME), as a kubelet does. envFrom stays as it is."""
    for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
        values: dict[str, str] = {}
        for item in container.get("env", []):
            path = item.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            value = _field(pod, path) if path else None
            if value is not None:
                del item["valueFrom"]
                item["value"] = value
            elif "valueFrom" not in item:
                item["value"] = substitute(item.get("value", ""), values)
            if "value" in item:
                values[item["name"]] = item["value"]
        for key in ("command", "args"):
            if key in container:
                container[key] = [substitute(word, values) for word in container[key]]


def _field(pod: Object, path: str) -> str | None:
    found = re.fullmatch(r"metadata\.(labels|annotations)\['([^']+)'\]", path)
    if found:
        return str(pod["metadata"][found[1]].get(found[2], ""))
    simple: dict[str, Any] = {
        "metadata.name": pod["metadata"]["name"],
        "metadata.namespace": pod["metadata"]["namespace"],
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
    }
    return simple.get(path)


def substitute(text: str, values: dict[str, str]) -> str:
    """$(NAME) → its value; an unknown name stays as it stands, and $$(NAME) is $(NAME)."""

    def one(found: re.Match[str]) -> str:
        if found[0].startswith("$$"):
            return found[0][1:]
        return values.get(found[1], found[0])

    return re.sub(r"\$?\$\(([^()]*)\)", one, text)
