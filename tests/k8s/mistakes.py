"""Mistakes as people make them: one place of one object is changed, and it is known which checks must tell."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.k8s.objects import name_of
from tests.k8s.render import Object

GONE = object()


class Mistake(NamedTuple):
    """What somebody did to `target` (Kind/name) of a world, and the checks that tell.

    path: keys between spaces; `name=X` is the list's item of that name, a number its index. value: what comes there, GONE to
    remove it, or a function of what was there. told: what the messages speak of, the target unless it is said.
    """

    what: str
    world: str
    target: str
    path: str
    value: Any
    checks: str
    told: str = ""


def plant(objects: list[Object], mistake: Mistake) -> list[Object]:
    """The objects with the mistake made. The place must exist, or at least what it is in: else the table is out of date."""
    (old,) = [tree for tree in objects if re.sub(r"-[0-9a-f]{10}$", "-", name_of(tree)) == mistake.target]
    tree = copy.deepcopy(old)
    *way, last = mistake.path.split()
    place: Any = tree
    for key in way:
        place = place[_key(place, key)]
    key = _key(place, last)
    if mistake.value is GONE:
        del place[key]
    else:
        before = place[key] if isinstance(place, list) or key in place else None
        place[key] = mistake.value(before) if callable(mistake.value) else mistake.value
    if tree == old:
        raise AssertionError(f"{mistake.what}: changes nothing")
    return [tree if one is old else one for one in objects]


def _key(place: Any, key: str) -> Any:
    if not isinstance(place, list):
        return key
    if key.isdigit():
        return int(key)
    name, _, value = key.partition("=")
    (number,) = [number for number, item in enumerate(place) if item.get(name) == value]
    return number


_JOB = "spec template spec replicatedJobs name=node template spec"
_POD = f"{_JOB} template spec"
_NODE, _VALIDATE = f"{_POD} containers name=node", f"{_POD} initContainers name=validate"
_PATCH = "spec runtimePatches 0 trainingRuntimeSpec template spec replicatedJobs name=node template spec template spec"
_HEAD = "spec rayClusterSpec headGroupSpec template spec"
_MLFLOW = "spec template spec containers name=mlflow"
_RUNTIME, _TRAIN, _SWEEP = "TrainingRuntime/warm-dist", "TrainJob/imagenet64", "RayJob/sweep-bnr"
_QUEUE, _PACK = "ClusterQueue/warm-dist", "JobSet/pack-imagenet64"
_RULE = "spec groups 0 rules alert=WarmDistSlow expr"
_QUEUE_LABEL, _PRIORITY = "metadata labels kueue.x-k8s.io/queue-name", "metadata labels kueue.x-k8s.io/priority-class"


def _more(extra: Any) -> Callable[[Any], Any]:
    return lambda old: [*(old or []), extra]


def _swap(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


AREAS = {
"validity": [
    Mistake("an API version that is gone", "gpu", "Deployment/mlflow", "apiVersion", "apps/v1beta1", "core_schema"),
    Mistake("no replica", "gpu", "Deployment/mlflow", "spec replicas", 0, "expanded selectors"),
    Mistake("a field of a custom resource misspelt", "gpu", _TRAIN, "spec trainer numNode", 4, "custom_schema"),
    Mistake("a field deep in its template misspelt", "gpu", _RUNTIME, f"{_NODE} imagePullPolicies", "Always", "custom_schema core_schema", _TRAIN),
    Mistake("a value that is not of the list", "gpu", _QUEUE, "spec queueingStrategy", "FIFO", "custom_schema"),
    Mistake("a number as text", "gpu", _TRAIN, "spec trainer numProcPerNode", "8", "custom_schema"),
    Mistake("an API version that is not served", "gpu", _QUEUE, "apiVersion", "kueue.x-k8s.io/v1", "custom_schema"),
    Mistake("a kind that nobody defines", "gpu", "PodMonitor/trainer", "apiVersion", "monitoring.example.com/v1", "custom_schema"),
    Mistake("CEL: a flavor without one of the covered resources", "gpu", _QUEUE, "spec resourceGroups 0 flavors name=cpu resources name=memory", GONE, "custom_schema quota"),
    Mistake("CEL: borrowing without a cohort", "gpu", _QUEUE, "spec resourceGroups 0 flavors name=gpu resources name=cpu borrowingLimit", 8, "custom_schema"),
    Mistake("CEL: two rules for one preemption", "gpu", _QUEUE, "spec preemption borrowWithinCohort", {"policy": "LowerPriority"}, "custom_schema"),
    Mistake("CEL: a name that DNS refuses", "gpu", _TRAIN, "metadata name", "64imagenet", "custom_schema", "TrainJob/64imagenet"),
    Mistake("CEL: an unknown manager", "gpu", _SWEEP, "spec managedBy", "me", "custom_schema"),
    Mistake("CEL: two ML policies", "gpu", _RUNTIME, "spec mlPolicy mpi", {}, "custom_schema"),
    Mistake("CEL: start in order, and dependencies", "gpu", _PACK, "spec startupPolicy", {"startupPolicyOrder": "InOrder"}, "custom_schema"),
    Mistake("CEL: PET_* injected where it is already", "gpu", _RUNTIME, "spec mlPolicy torch envInjection", {"targets": [{"jobName": "node", "containerNames": ["node"]}]}, "custom_schema"),
    Mistake("one volume twice", "gpu", _RUNTIME, f"{_POD} volumes", _more({"name": "tmp", "emptyDir": {}}), "custom_schema"),
    Mistake("a namespace on what is the cluster's", "gpu", _QUEUE, "metadata namespace", "warm-dist", "custom_schema"),
    Mistake("no namespace", "gpu", "PrometheusRule/warm-dist", "metadata namespace", GONE, "custom_schema rules"),
    Mistake("a field of a core kind misspelt", "gpu", "Deployment/mlflow", "spec replica", 2, "core_schema"),
    Mistake("a port that is no number", "gpu", "Service/mlflow", "spec ports 0 port", "http", "core_schema addresses", "Service/mlflow"),
],
"references": [
    Mistake("one object twice", "gpu", "NetworkPolicy/s3", "metadata name", "ray", "names", "NetworkPolicy/ray"),
    Mistake("a ConfigMap renamed, as by a new hash", "gpu", _TRAIN, f"{_PATCH} volumes name=config configMap name", "imagenet64-0123456789", "config_maps programs"),
    Mistake("a ConfigMap's key misspelt", "gpu", "Deployment/mlflow", f"{_MLFLOW} env name=MLFLOW_ARTIFACTS_DESTINATION valueFrom configMapKeyRef key", "MLFLOW_ARTEFACTS", "config_maps"),
    Mistake("a Secret's key misspelt", "gpu", "StatefulSet/postgres", "spec template spec containers 0 env name=POSTGRES_PASSWORD valueFrom secretKeyRef key", "pasword", "secrets"),
    Mistake("a Secret that nobody is told to make", "gpu", _SWEEP, "spec rayClusterSpec authOptions secretName", "ray-auth", "secrets"),
    Mistake("an account that is missing", "gpu", _RUNTIME, f"{_POD} serviceAccountName", "trainers", "accounts", _TRAIN),
    Mistake("a claim misspelt", "gpu", _PACK, "spec replicatedJobs name=part template spec template spec volumes name=images persistentVolumeClaim claimName", "imagez", "volumes"),
    Mistake("a mount of no volume", "gpu", _RUNTIME, f"{_NODE} volumeMounts name=shm name", "shmem", "volumes shared_memory", _TRAIN),
    Mistake("a volume that nothing mounts", "gpu", _RUNTIME, f"{_POD} volumes", _more({"name": "cache", "emptyDir": {}}), "volumes", _TRAIN),
    Mistake("a budget's label misspelt", "gpu", "PodDisruptionBudget/mlflow", "spec selector matchLabels app.kubernetes.io/component", "ml-flow", "selectors"),
    Mistake("a Deployment that does not select its pods", "gpu", "Deployment/mlflow", "spec selector matchLabels app.kubernetes.io/component", "server", "selectors"),
    Mistake("a monitor's port misspelt", "gpu", "PodMonitor/trainer", "spec podMetricsEndpoints 0 port", "metric", "endpoints"),
    Mistake("a Service's target misspelt", "gpu", "Service/postgres", "spec ports 0 targetPort", "postgresql", "ports"),
    Mistake("a probe's port misspelt", "gpu", "Deployment/mlflow", f"{_MLFLOW} readinessProbe httpGet port", "web", "ports"),
    Mistake("MLflow's port changed in the Service alone", "gpu", "Service/mlflow", "spec ports 0 port", 5001, "addresses", "mlflow:5000"),
    Mistake("a Service of another name", "dev", "Service/s3", "metadata name", "object-store", "addresses", "s3:8333"),
    Mistake("a probe of another host", "gpu", "Deployment/mlflow", f"{_MLFLOW} readinessProbe httpGet host", "example.com", "ports"),
],
"queues": [
    Mistake("nodes that are no GPU nodes", "gpu", _TRAIN, f"{_PATCH} nodeSelector", {"nvidia.com/gpu.present": "false"}, "quota"),
    Mistake("a sweep before a training", "gpu", "WorkloadPriorityClass/sweep", "value", 2000, "priorities", "WorkloadPriorityClass/data"),
    Mistake("a sweep that says it is a training", "gpu", _SWEEP, _PRIORITY, "train", "priorities"),
    Mistake("nobody gives way", "gpu", _QUEUE, "spec preemption withinClusterQueue", "Never", "priorities"),
    Mistake("a queue misspelt", "gpu", _TRAIN, _QUEUE_LABEL, "warmdist", "queues"),
    Mistake("not queued at all", "gpu", _SWEEP, _QUEUE_LABEL, GONE, "queues"),
    Mistake("a priority misspelt", "gpu", _SWEEP, _PRIORITY, "sweeps", "queues"),
    Mistake("not suspended", "gpu", _PACK, "spec suspend", False, "queues"),
    Mistake("a queue of no ClusterQueue", "gpu", "LocalQueue/warm-dist", "spec clusterQueue", "warm", "queues"),
    Mistake("a ClusterQueue that lets nobody in", "gpu", _QUEUE, "spec namespaceSelector matchLabels kubernetes.io/metadata.name", "default", "queues"),
    Mistake("a flavor that is missing", "gpu", _QUEUE, "spec resourceGroups 0 flavors name=cpu name", "cpus", "queues"),
    Mistake("a resource that the queue does not cover", "gpu", _TRAIN, "spec trainer resourcesPerNode requests ephemeral-storage", "100Gi", "quota"),
    Mistake("more GPUs than the quota", "gpu", _QUEUE, "spec resourceGroups 0 flavors name=gpu resources name=nvidia.com/gpu nominalQuota", 24, "quota", _TRAIN),
    Mistake("more memory than the quota", "gpu", _TRAIN, "spec trainer resourcesPerNode requests memory", "3Ti", "quota security"),
    Mistake("no flavor for what has no GPU", "dev", _QUEUE, "spec resourceGroups 0 flavors name=cpu resources name=cpu nominalQuota", 0, "quota", "TrainJob/quickstart"),
    Mistake("a taint that nobody tolerates", "gpu", "ResourceFlavor/gpu", "spec", {"nodeTaints": [{"key": "gpu", "effect": "NoSchedule"}]}, "quota", _TRAIN),
],
"trainings": [
    Mistake("a patch for a container that is missing", "gpu", _TRAIN, f"{_PATCH} containers", [{"name": "trainer"}], "runtimes KSV-0001 KSV-0003 KSV-0004 KSV-0014 KSV-0015 KSV-0016 KSV-0018 KSV-0106"),
    Mistake("no rendezvous", "gpu+jobset", "JobSet/imagenet64", "spec replicatedJobs name=node template spec template spec containers name=node env name=PET_MASTER_ADDR", GONE, "world_size"),
    Mistake("a patch of nobody's", "gpu", _TRAIN, "spec runtimePatches 0 manager", "render", "runtimes"),
    Mistake("trials larger than a worker", "gpu", _SWEEP, "spec rayClusterSpec workerGroupSpecs groupName=trials template spec containers 0 resources", {"requests": {"cpu": 64, "memory": "512Gi", "nvidia.com/gpu": 4}, "limits": {"memory": "512Gi", "nvidia.com/gpu": 4}}, "trials_fit"),
    Mistake("no worker", "gpu", _SWEEP, "spec rayClusterSpec workerGroupSpecs groupName=trials replicas", 0, "trials_fit"),
    Mistake("a runtime that is missing", "gpu", _TRAIN, "spec runtimeRef name", "warm", "runtimes selectors world_size"),
    Mistake("the cluster's runtime meant", "gpu", _TRAIN, "spec runtimeRef kind", GONE, "runtimes selectors world_size"),
    Mistake("node's variables in a patch", "gpu", _TRAIN, f"{_PATCH} containers", [{"name": "node", "env": [{"name": "A", "value": "b"}]}], "runtimes"),
    Mistake("a patch for a job that is missing", "gpu", _TRAIN, "spec runtimePatches", _more({"manager": "a.b/c", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [{"name": "nodes"}]}}}}), "runtimes"),
    Mistake("Trainer's variable set by hand", "gpu", _TRAIN, "spec trainer env", [{"name": "PET_NNODES", "value": "4"}], "runtimes"),
    Mistake("and in the runtime", "gpu", _RUNTIME, f"{_NODE} env", _more({"name": "PET_MASTER_PORT", "value": "1"}), "runtimes"),
    Mistake("another number of processes validated", "gpu", _TRAIN, f"{_PATCH} initContainers name=validate env name=WORLD_SIZE value", "16", "world_size"),
    Mistake("nodes changed, WORLD_SIZE not", "gpu", _TRAIN, "spec trainer numNodes", 2, "world_size"),
    Mistake("processes that the batch cannot be dealt to", "gpu", _TRAIN, "spec trainer numNodes", 3, "world_size"),
    Mistake("processes without a GPU", "gpu", _TRAIN, "spec trainer resourcesPerNode", {"requests": {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "4"}, "limits": {"memory": "512Gi", "nvidia.com/gpu": "4"}}, "world_size"),
    Mistake("nodes of a JobSet changed in one place", "gpu+jobset", "JobSet/imagenet64", "spec replicatedJobs name=node template spec completions", 2, "world_size"),
    Mistake("a rendezvous that is not there", "gpu+jobset", "JobSet/imagenet64", "spec network", {"subdomain": "train"}, "world_size"),
    Mistake("a grace period of 200 s", "gpu", _RUNTIME, f"{_POD} terminationGracePeriodSeconds", 200, "time_to_stop", _TRAIN),
    Mistake("no grace period", "gpu", _RUNTIME, f"{_POD} terminationGracePeriodSeconds", GONE, "time_to_stop", _TRAIN),
    Mistake("a hook that sleeps longer than that", "gpu", _RUNTIME, f"{_NODE} lifecycle preStop", {"exec": {"command": ["sleep", "300"]}}, "time_to_stop", _TRAIN),
    Mistake("/dev/shm on disk", "gpu", _RUNTIME, f"{_POD} volumes name=shm emptyDir medium", GONE, "shared_memory", _TRAIN),
    Mistake("Ray's /dev/shm of any size", "gpu", _SWEEP, f"{_HEAD} volumes name=shm emptyDir sizeLimit", GONE, "shared_memory"),
    Mistake("the image's own command", "gpu", _RUNTIME, f"{_VALIDATE} command", GONE, "programs world_size", _TRAIN),
    Mistake("no preStop hook", "gpu", _RUNTIME, f"{_NODE} lifecycle", GONE, "time_to_stop", _TRAIN),
],
"failures": [
    Mistake("a policy's container misspelt", "gpu", _RUNTIME, f"{_JOB} podFailurePolicy rules 0 onExitCodes containerName", "validator", "failure_outcomes", _TRAIN),
    Mistake("a rule put before the others", "gpu", _RUNTIME, f"{_JOB} podFailurePolicy rules", lambda old: [old[-1], *old[:-1]], "failure_outcomes", _TRAIN),
    Mistake("a message of an index that is not there", "gpu", _RUNTIME, "spec template spec failurePolicy rules 0 onJobFailureMessagePatterns", ["at index 7$"], "failure_outcomes", _TRAIN),
    Mistake("a message of a wrong index", "gpu", _RUNTIME, "spec template spec failurePolicy rules 1 onJobFailureMessagePatterns", ["at index 0$"], "failure_outcomes", _TRAIN),
    Mistake("single pods made anew", "gpu", _RUNTIME, f"{_JOB} backoffLimit", 6, "failure_outcomes", _TRAIN),
    Mistake("no restarts", "gpu", _RUNTIME, "spec template spec failurePolicy maxRestarts", 0, "failure_outcomes", _TRAIN),
    Mistake("no failure policy", "gpu", _RUNTIME, "spec template spec failurePolicy", GONE, "failure_outcomes", _TRAIN),
    Mistake("containers restarted in place", "gpu", _RUNTIME, f"{_POD} restartPolicy", "OnFailure", "failure_outcomes", _TRAIN),
    Mistake("a disruption that costs a packer's retry", "gpu", _PACK, "spec replicatedJobs name=part template spec podFailurePolicy rules 0 action", "FailJob", "failure_outcomes"),
],
"programs": [
    Mistake("an unknown flag", "gpu", _RUNTIME, f"{_NODE} args", _more("--epochs=3"), "programs", _TRAIN),
    Mistake("a flag that needs another", "gpu", _RUNTIME, f"{_VALIDATE} args", ["--config", "/etc/warm-dist/train.json", "--world-size", "8"], "programs", _TRAIN),
    Mistake("an unknown flag of a sweep", "gpu", _SWEEP, "spec entrypoint", _swap("--resume", "--resume --from=3"), "programs"),
    Mistake("a packer's flag, in a shell", "gpu", _PACK, "spec replicatedJobs name=part template spec template spec containers 0 command 2", _swap("--part", "--piece"), "programs"),
    Mistake("parts counted from 0", "gpu", _PACK, "spec replicatedJobs name=part template spec template spec containers 0 command 2", _swap(" + 1", " + 0"), "programs packing"),
    Mistake("a program that is not there", "gpu", _RUNTIME, f"{_VALIDATE} command", ["python", "launch/validate.py"], "programs world_size", _TRAIN),
    Mistake("an unknown key by --set", "gpu", _RUNTIME, f"{_NODE} args", _more("--set=train.learning_rate=1"), "programs", _TRAIN),
    Mistake("an unknown key of a sweep by --set", "gpu", _SWEEP, "spec entrypoint", _swap("--resume", "--resume --set trial.max_failurs=3"), "programs"),
    Mistake("a config at another path", "gpu", _SWEEP, "spec entrypoint", _swap("sweep.json", "sweeps.json"), "programs"),
    Mistake("a config with an unknown key", "gpu", "ConfigMap/imagenet64-", "data train.json", _swap('"num_lanes"', '"lanes"'), "programs", _TRAIN),
    Mistake("a path of the image's, in Ray", "gpu", _SWEEP, "spec entrypoint", _swap("/opt/warm-dist/", ""), "programs"),
    Mistake("another folder for a relative path", "gpu", _RUNTIME, f"{_NODE} workingDir", "/scratch", "programs world_size", _TRAIN),
],
"security": [
    Mistake("a namespace of another name", "gpu", "Namespace/warm-dist", "metadata name", "warmdist", "security"),
    Mistake("root allowed", "gpu", _RUNTIME, f"{_POD} securityContext runAsNonRoot", GONE, "KSV-0012", _TRAIN),
    Mistake("a host's folder", "gpu", _RUNTIME, f"{_POD} volumes name=scratch", {"name": "scratch", "hostPath": {"path": "/mnt"}}, "KSV-0023", _TRAIN),
    Mistake("privilege escalation", "gpu", "Deployment/mlflow", f"{_MLFLOW} securityContext allowPrivilegeEscalation", GONE, "KSV-0001"),
    Mistake("a capability, as NCCL's guides say", "gpu", _RUNTIME, f"{_NODE} securityContext capabilities add", ["IPC_LOCK"], "KSV-0022 KSV-0106", _TRAIN),
    Mistake("capabilities kept", "gpu", _SWEEP, f"{_HEAD} containers 0 securityContext capabilities", GONE, "KSV-0003 KSV-0004 KSV-0106"),
    Mistake("the host's network, as NCCL's guides say", "gpu", _RUNTIME, f"{_POD} hostNetwork", True, "KSV-0009", _TRAIN),
    Mistake("no seccomp", "gpu", "StatefulSet/postgres", "spec template spec securityContext seccompProfile type", "Unconfined", "KSV-0030 KSV-0104"),
    Mistake("no submitter of our own", "gpu", _SWEEP, "spec submitterPodTemplate", GONE, "accounts security KSV-0001 KSV-0003 KSV-0004 KSV-0012 KSV-0014 KSV-0020 KSV-0021 KSV-0030 KSV-0104 KSV-0106 KSV-0118"),
    Mistake("a writable root", "gpu", _PACK, "spec replicatedJobs name=whole template spec template spec containers 0 securityContext readOnlyRootFilesystem", GONE, "KSV-0014"),
    Mistake("nobody's uid", "gpu", _RUNTIME, f"{_POD} securityContext runAsUser", GONE, "KSV-0020", _TRAIN),
    Mistake("a token in a pod", "gpu", _RUNTIME, f"{_POD} automountServiceAccountToken", GONE, "security", _TRAIN),
    Mistake("an account's token", "gpu", "ServiceAccount/ray", "automountServiceAccountToken", True, "security"),
    Mistake("the latest image", "gpu", "Deployment/mlflow", f"{_MLFLOW} image", "registry.example.com/warm-dist:latest", "KSV-0013"),
    Mistake("an image without a tag", "gpu", "StatefulSet/postgres", "spec template spec containers 0 image", "docker.io/library/postgres", "KSV-0013"),
    Mistake("no limit on memory", "gpu", "Deployment/mlflow", f"{_MLFLOW} resources limits", GONE, "KSV-0018"),
    Mistake("a namespace that admits more", "gpu", "Namespace/warm-dist", "metadata labels pod-security.kubernetes.io/enforce", "baseline", "security"),
    Mistake("a container that may be root", "gpu", _RUNTIME, f"{_NODE} securityContext runAsNonRoot", False, "security", _TRAIN),
    Mistake("no AppArmor", "gpu", _RUNTIME, f"{_NODE} securityContext appArmorProfile", {"type": "Unconfined"}, "security", _TRAIN),
    Mistake("a limit below what is requested", "gpu", "Deployment/mlflow", f"{_MLFLOW} resources limits memory", "1Gi", "security"),
],
"network": [
    Mistake("denied one way only", "gpu", "NetworkPolicy/default-deny", "spec policyTypes", ["Ingress"], "default_deny", "Namespace/warm-dist"),
    Mistake("denied for some", "gpu", "NetworkPolicy/default-deny", "spec podSelector", {"matchLabels": {"app.kubernetes.io/component": "trainer"}}, "default_deny", "Namespace/warm-dist"),
    Mistake("no DNS", "gpu", "NetworkPolicy/dns", "spec egress 0 ports", [{"protocol": "UDP", "port": 5353}], "flows", "cannot reach DNS"),
    Mistake("no DNS by TCP", "gpu", "NetworkPolicy/dns", "spec egress 0 ports", [{"protocol": "UDP", "port": 53}], "flows", "cannot reach DNS"),
    Mistake("another port for the database", "gpu", "NetworkPolicy/postgres", "spec ingress 0 ports 0 port", 5433, "flows", "postgres"),
    Mistake("ranks that do not hear each other", "gpu", "NetworkPolicy/trainer", "spec ingress", GONE, "flows", _TRAIN),
    Mistake("ranks on one port only", "gpu", "NetworkPolicy/trainer", "spec ingress 0 ports", [{"protocol": "TCP", "port": 29500}], "flows", _TRAIN),
    Mistake("all ports, everywhere", "gpu", "NetworkPolicy/s3", "spec egress 0", {}, "flows", "can reach"),
    Mistake("the node's credentials", "gpu", "NetworkPolicy/s3", "spec egress 0", {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}, "flows", "metadata service"),
    Mistake("everybody may ask the database", "gpu", "NetworkPolicy/postgres", "spec ingress 0 from", GONE, "flows", "postgres"),
    Mistake("a component misspelt", "gpu", "NetworkPolicy/ray", "spec podSelector matchLabels app.kubernetes.io/component", "rays", "selectors flows", "NetworkPolicy/ray"),
    Mistake("Prometheus in another namespace", "gpu", "NetworkPolicy/prometheus", "spec ingress 0 from 0 namespaceSelector matchLabels kubernetes.io/metadata.name", "prometheus", "flows", "Prometheus"),
    Mistake("rules that nobody reads", "gpu", "NetworkPolicy/mlflow", "spec policyTypes", ["Ingress"], "flows", "Deployment/mlflow"),
],
"monitoring": [
    Mistake("an alert on what nobody exports", "gpu", "PrometheusRule/warm-dist", "spec groups 0 rules alert=WarmDistSlow expr", 'warm_dist_train_img_per_s{namespace="warm-dist"} < 1', "rules"),
    Mistake("and a text that speaks of it", "gpu", "PrometheusRule/warm-dist", "spec groups 0 rules alert=WarmDistSlow annotations description", "see warm_dist_rank_load_s", "rules"),
    Mistake("metrics on loopback", "gpu", "ConfigMap/imagenet64-", "data train.json", _swap('"0.0.0.0"', '"127.0.0.1"'), "endpoints", "PodMonitor/trainer"),
    Mistake("metrics at another port", "gpu", "ConfigMap/imagenet64-", "data train.json", _swap("9400", "9401"), "endpoints", "PodMonitor/trainer"),
],
"invariants": [
    Mistake("a cluster that stays", "gpu", _SWEEP, "spec shutdownAfterJobFinishes", GONE, "ray_jobs"),
    Mistake("a sweep that begins anew", "gpu", _SWEEP, "spec entrypoint", _swap(" --resume", ""), "ray_jobs"),
    Mistake("Ray of another version", "gpu", _SWEEP, "spec rayClusterSpec rayVersion", "2.40.0", "ray_jobs"),
    Mistake("Ray for the world", "gpu", _SWEEP, "spec rayClusterSpec headGroupSpec serviceType", "LoadBalancer", "ray_jobs"),
    Mistake("Ray for everybody", "gpu", _SWEEP, "spec rayClusterSpec authOptions mode", "disabled", "ray_jobs"),
    Mistake("a volume that is root's", "gpu", "StatefulSet/postgres", "spec template spec securityContext fsGroup", GONE, "security"),
    Mistake("a secret written out", "gpu", "Deployment/mlflow", f"{_MLFLOW} env", _more({"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}), "literal_secrets"),
    Mistake("a secret in the settings", "gpu", "ConfigMap/settings", "data AWS_SECRET_ACCESS_KEY", "abc", "literal_secrets KSV-0109 KSV-01010"),
    Mistake("five minutes for a lost node", "gpu", _RUNTIME, f"{_POD} tolerations", [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30}], "lost_nodes", _TRAIN),
    Mistake("a sweep that no GPU node takes", "gpu", _SWEEP, "spec rayClusterSpec workerGroupSpecs 0 template spec tolerations", GONE, "quota"),
    Mistake("GPU nodes for everybody", "gpu", "ResourceFlavor/gpu", "spec nodeTaints", GONE, "quota"),
    Mistake("a packer on GPU nodes", "gpu", _PACK, "spec replicatedJobs name=whole template spec template spec tolerations", [{"operator": "Exists"}], "quota"),
    Mistake("one data set of what is not there yet", "gpu", _PACK, "spec replicatedJobs name=whole dependsOn", GONE, "packing"),
    Mistake("an expression that does not parse", "gpu", "PrometheusRule/warm-dist", _RULE, 'warm_dist_train_loss{namespace="warm-dist"} > 2 and foo{', "rules"),
    Mistake("an alert for another namespace", "gpu", "PrometheusRule/warm-dist", _RULE, 'warm_dist_train_loss{namespace="warmdist"} > 2', "rules"),
    Mistake("an alert for all namespaces", "gpu", "PrometheusRule/warm-dist", _RULE, "warm_dist_train_loss > 2", "rules"),
    Mistake("metrics of pods that have none", "gpu", "PodMonitor/trainer", "spec selector matchLabels batch.kubernetes.io/job-completion-index", GONE, "endpoints"),
    Mistake("metrics of a pod that has none", "gpu", "PodMonitor/trainer", "spec selector matchLabels batch.kubernetes.io/job-completion-index", "1", "endpoints"),
    Mistake("a node that cannot be drained", "gpu", "PodDisruptionBudget/mlflow", "spec maxUnavailable", 0, "budgets"),
    Mistake("the node's credentials as a fallback", "gpu", "ConfigMap/settings", "data AWS_EC2_METADATA_DISABLED", "false", "literal_secrets"),
    Mistake("a quantity that an update changes", "gpu", _TRAIN, "spec trainer resourcesPerNode limits memory", "1024Gi", "canonical"),
    Mistake("64 MB of shared memory", "gpu", _RUNTIME, f"{_POD} volumes name=shm emptyDir sizeLimit", "64Mi", "shared_memory", _TRAIN),
    Mistake("one part too few", "gpu", _PACK, "spec replicatedJobs name=part template spec completions", 7, "packing"),
],
}  # fmt: skip
MISTAKES = [mistake for area in AREAS.values() for mistake in area]
