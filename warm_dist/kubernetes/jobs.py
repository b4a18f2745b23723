"""Renders the Kubernetes objects of a job: templates of k8s/base with a checked config, names and sizes filled in."""

from __future__ import annotations

import copy
import hashlib
import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from warm_dist.config.batch import batch_equation, check_world_size
from warm_dist.config.load import assign, dump, validate_as
from warm_dist.config.run import Config
from warm_dist.config.sweep import Origins, SweepConfig
from warm_dist.config.values import exact
from warm_dist.errors import ConfigError
from warm_dist.kubernetes import checks
from warm_dist.kubernetes.checks import SCRATCH, SOURCES, Object
from warm_dist.sweeps.trials import trials

STOP_FILE = f"{SCRATCH}/stop"  # created by the preStop hook of base/training
MLFLOW_URL = "http://mlflow:5000"  # the Service of base/tracking
METRICS_PORT, MASTER_PORT = 9400, 29500
GPU = "nvidia.com/gpu"
_IMAGES = "/images"  # where the claim `images` is mounted


@dataclass(frozen=True)
class JobSize:
    """The size of a job. gpus: per node, one for each process (0: train on CPUs). cpus, memory_gib: per process."""

    nodes: int
    gpus: int
    processes: int
    cpus: int
    memory_gib: int

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.processes < 1 or self.cpus < 1 or self.memory_gib < 1 or self.gpus < 0:
            raise ConfigError(f"{self}: nodes, processes, cpus and memory must be positive, gpus not negative")
        if self.gpus and self.gpus != self.processes:
            raise ConfigError(f"{self.processes} processes cannot use {self.gpus} GPUs: each process needs one")

    @property
    def world(self) -> int:
        """The number of processes on all nodes."""
        return self.nodes * self.processes

    @property
    def resources(self) -> Object:
        """Requests and limits of one node's pod. CPU has no limit, which would only slow it down."""
        gib = self.processes * self.memory_gib
        # in the largest unit, as Kubernetes normalises it: applying an unchanged TrainJob again must change nothing
        memory = {"memory": f"{gib}Gi" if gib % 1024 else f"{gib // 1024}Ti"}
        gpus = {GPU: str(self.gpus)} if self.gpus else {}
        return {"requests": {"cpu": str(self.processes * self.cpus), **memory, **gpus}, "limits": {**memory, **gpus}}

    def __str__(self) -> str:
        processes = f"{self.gpus} GPUs" if self.gpus else f"{self.processes} processes"
        return f"{self.nodes} nodes x {processes}"


@dataclass(frozen=True)
class RenderedJob:
    """Objects in the order to apply, and a summary for the user."""

    objects: list[Object]
    summary: str


def training(
    config: Config, name: str, size: JobSize, template: Object, runtime: Object, image: str | None
) -> RenderedJob:
    """The ConfigMap and TrainJob of a run. template, runtime: the TrainJob and TrainingRuntime of k8s/base/training.

    image: replaces the runtime's; the run then gets its own runtime. Raises ConfigError for a config that pods cannot
    run, WorldSizeError with the valid sizes.
    """
    checks.check_name(name)
    config = in_pods(config, name)
    check_world_size(config, size.world)
    settings = _config_map(name, template, {"train.json": _text(dump(config))})
    job = _named(template, name)
    trainer = job["spec"]["trainer"]
    trainer |= {"numNodes": size.nodes, "numProcPerNode": size.processes, "resourcesPerNode": size.resources}
    if not size.gpus:
        trainer["env"] = [{"name": "DS_ACCELERATOR", "value": "cpu"}]
    pod = _pod_of(job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"])
    pod["initContainers"][0]["env"] = [{"name": "WORLD_SIZE", "value": str(size.world)}]
    _use(pod, settings)
    objects = [settings, job]
    if image:  # TrainJob.spec.trainer.image does not change the init container's image
        own = _named(runtime, name)
        _set_image(_pod_of(own["spec"]), image)
        job["spec"]["runtimeRef"]["name"] = name
        objects = [settings, own, job]
    return RenderedJob(objects, f"{size} = {size.world} processes; {batch_equation(config, size.world)}")


def without_trainer(job: RenderedJob, runtime: Object) -> RenderedJob:
    """The same training as the JobSet that Kubeflow Trainer would create, for clusters without Trainer.

    runtime: the TrainingRuntime of k8s/base/training. Source: Kubeflow Trainer v2.3.0, plugins torch and jobset.
    """
    train_job = job.objects[-1]
    runtime = next((other for other in job.objects if other["kind"] == "TrainingRuntime"), runtime)
    trainer, name = train_job["spec"]["trainer"], train_job["metadata"]["name"]
    spec = copy.deepcopy(runtime["spec"]["template"]["spec"])
    (replicated,) = spec["replicatedJobs"]
    nodes = {"parallelism": trainer["numNodes"], "completions": trainer["numNodes"]}
    replicated["template"]["spec"] |= {"completionMode": "Indexed", **nodes}
    pod = _pod_of({"template": {"spec": spec}})
    patch = _pod_of(train_job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"])
    pod["initContainers"][0]["env"] += patch["initContainers"][0]["env"]
    _use(pod, {"metadata": {"name": patch["volumes"][0]["configMap"]["name"]}})
    (node,) = pod["containers"]
    node["resources"] = trainer["resourcesPerNode"]
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    node["env"] += [
        *trainer.get("env", []),
        {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": index}},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": str(MASTER_PORT)},
    ]
    node["ports"] += [{"containerPort": MASTER_PORT}]
    head = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": train_job["metadata"]}
    rest = [other for other in job.objects if other["kind"] == "ConfigMap"]
    return RenderedJob([*rest, {**head, "spec": {"suspend": True, **spec}}], job.summary)


def in_pods(config: Config, name: str) -> Config:
    """The config for a TrainJob's pods: paths on their disk, their stop file, the cluster's MLflow and Prometheus.

    Raises ConfigError for data that a pod cannot reach or would lose.
    """
    tree = dump(config)
    if config.checkpoint.url is None:
        raise ConfigError(f"checkpoint.url is null: pods lose their disks; set it to s3://your-bucket/runs/{name}")
    checks.check_store("checkpoint.url", config.checkpoint.url)
    checks.check_visible(config)
    checks.check_secrets(tree)
    tree["output"] = f"{SCRATCH}/{name}"
    tree["parallel"]["preemption_file"] = STOP_FILE
    tree["tracking"] |= {"prometheus_port": METRICS_PORT, "prometheus_host": "0.0.0.0"}
    tree["tracking"]["mlflow_url"] = config.tracking.mlflow_url or MLFLOW_URL
    tree["tracking"]["run_name"] = config.tracking.run_name or name
    tree["data"]["cache_dir"] = config.data.cache_dir or f"{SCRATCH}/cache"
    return validate_as(Config, tree, name)


def sweep(
    settings: SweepConfig,
    base: dict[str, JsonValue],
    origins: Origins,
    name: str,
    size: JobSize,
    template: Object,
    image: str | None,
) -> RenderedJob:
    """The ConfigMap and RayJob of a sweep. settings, base, origins: as `load_sweep` returns them.

    template: k8s/base/tuning/rayjob.yaml. Raises ConfigError for a sweep that pods cannot run, or whose trials do not fit
    the job.
    """
    checks.check_name(name)
    checks.check_store("output", settings.output)
    checks.check_reachable("endpoint_url", settings.endpoint_url)
    if settings.ray_address:
        raise ConfigError(f"ray_address {settings.ray_address}: a RayJob starts its own Ray; leave it null")
    base = copy.deepcopy(base)
    every = trials(settings, base, origins)
    config = every[0].config
    checks.check_visible(config)
    for part in (dump(settings), dump(config)):
        checks.check_secrets(part)
    assign(base, "tracking.mlflow_url", config.tracking.mlflow_url or MLFLOW_URL, name)
    at_once = _trials_at_once(settings, size)
    tree = dump(settings) | {"base": "base.json", "set": {}, "node_dir": f"{SCRATCH}/sweeps"}
    files = {"sweep.json": _text(tree), "base.json": _text(base)}
    config_map = _config_map(name, template, files)
    job = _named(template, name)
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    workers |= {"replicas": size.nodes, "minReplicas": size.nodes, "maxReplicas": size.nodes}
    workers["rayStartParams"] |= {"num-cpus": str(size.processes * size.cpus), "num-gpus": str(size.gpus)}
    worker, head = workers["template"]["spec"], cluster["headGroupSpec"]["template"]["spec"]
    worker["containers"][0]["resources"] = size.resources
    _use(head, config_map)
    for pod in (worker, head, job["spec"]["submitterPodTemplate"]["spec"]):
        _set_image(pod, image)
    text = f"{len(every)} trials of {settings.trial.processes} processes, {at_once} at a time on {size}"
    return RenderedJob([config_map, job], text)


def _trials_at_once(settings: SweepConfig, size: JobSize) -> int:
    trial, have = settings.trial, {"CPU": float(size.processes * size.cpus), "GPU": float(size.gpus)}
    per_node = int(min(have[kind] // amount for kind, amount in trial.bundle.items()))
    at_once = size.nodes // trial.nodes if trial.nodes > 1 else size.nodes * per_node
    if not per_node or not at_once:
        needs = " and ".join(f"{exact(amount)} {kind}" for kind, amount in trial.bundle.items())
        offer = f"{size} have {exact(have['CPU'])} CPU and {size.gpus} GPU each"
        raise ConfigError(f"a trial needs {needs} on each of {trial.nodes} nodes; {offer}")
    return min(at_once, settings.max_concurrent or at_once)


def packing(
    source: str,
    out_url: str,
    endpoint_url: str | None,
    arguments: Sequence[str],
    name: str,
    size: JobSize,
    template: Object,
    image: str | None,
) -> RenderedJob:
    """The JobSet that packs a data set in size.nodes parts and merges them. template: k8s/base/data/pack.yaml.

    arguments: of data_pipelines.pack; source, out_url and endpoint_url repeat theirs. A path must be in the
    PersistentVolumeClaim `images`, mounted at /images. Raises ConfigError for data that pods cannot reach.
    """
    checks.check_name(name)
    checks.check_store("out_url", out_url)
    inside = posixpath.normpath(source)
    claimed = inside == _IMAGES or inside.startswith(f"{_IMAGES}/")
    if not claimed and source not in SOURCES:
        known = f"{', '.join(SOURCES)}, and the claim `images` at {_IMAGES}"
        raise ConfigError(f"source {source!r}: pods have {known}; they cannot see your other paths")
    checks.check_reachable("--endpoint-url", endpoint_url)
    job = _named(template, name)
    parts, whole = (replicated["template"]["spec"] for replicated in job["spec"]["replicatedJobs"])
    words = [checks.literal(word) for word in (*arguments, "--workers", str(size.processes))]
    for spec in (parts, whole):
        pod = spec["template"]["spec"]
        pod["containers"][0] |= {"args": words, "resources": size.resources}
        _set_image(pod, image)
        if claimed:
            claim = {"claimName": "images", "readOnly": True}
            pod["volumes"] = [*pod["volumes"], {"name": "images", "persistentVolumeClaim": claim}]
            mount = {"name": "images", "mountPath": _IMAGES, "readOnly": True}
            pod["containers"][0]["volumeMounts"] = [*pod["containers"][0]["volumeMounts"], mount]
    parts |= {"completions": size.nodes, "parallelism": size.nodes}
    script = f'exec python -m data_pipelines.pack "$@" --part "$((JOB_COMPLETION_INDEX + 1))/{size.nodes}"'
    parts["template"]["spec"]["containers"][0] |= {"command": ["sh", "-c", script, "pack"]}
    return RenderedJob([job], f"{size.nodes} parts of {size.processes} processes each, then one data set: {out_url}")


def _named(template: Object, name: str) -> Object:
    job: Object = json.loads(json.dumps(template))  # a deep copy would keep YAML's anchors shared
    job["metadata"]["name"] = name
    return job


def _config_map(name: str, template: Object, files: dict[str, str]) -> Object:
    """An immutable ConfigMap named after its content, so that a job never sees another config than its own."""
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:10]
    labels = {key: value for key, value in template["metadata"]["labels"].items() if not key.startswith("kueue")}
    metadata = {"name": f"{name}-{digest}", "namespace": template["metadata"]["namespace"], "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "immutable": True, "data": files}


def _pod_of(runtime: Object) -> Object:
    """The spec of the pod template in a TrainingRuntime's spec, or in a patch of it."""
    (replicated,) = runtime["template"]["spec"]["replicatedJobs"]
    pod: Object = replicated["template"]["spec"]["template"]["spec"]
    return pod


def _use(pod: Object, config_map: Object) -> None:
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "config")
    volume["configMap"] = {"name": config_map["metadata"]["name"]}


def _set_image(pod: Object, image: str | None) -> None:
    if image:
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            container["image"] = image


def _text(tree: Any) -> str:
    return json.dumps(tree, indent=2) + "\n"
