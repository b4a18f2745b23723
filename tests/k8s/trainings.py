"""What trainings and sweeps need beyond being valid: numbers that agree, time to stop, shared memory, room."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.k8s.expand import runtime_of
from tests.k8s.objects import GPU, containers, labels, name_of, owner, quantity, variables
from tests.k8s.programs import Run, commands, runs
from tests.k8s.queueing import requests
from tests.k8s.render import Object
from tests.k8s.trainer import patches
from tests.k8s.world import World, check
from warm_dist.config.batch import check_world_size
from warm_dist.errors import WarmDistError
from warm_dist.kubernetes.node import STOPPED_S

RAY = "ray.io/node-type"
TORCHRUN_S = 30  # torch.distributed.elastic gives its workers so long after SIGTERM, then SIGKILL
RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}


class Training(NamedTuple):
    """launch/node.py on each of its pods, and what its first init container validates with. config: None if it is not read."""

    name: str
    nodes: list[Run]
    validate: Run | None
    config: Any


@functools.lru_cache(maxsize=1)
def trainings(world: World) -> list[Training]:
    found: dict[str, list[Run]] = {}
    first = {owner(run.pod): run for run in runs(world) if run.module == "launch.train"}
    for run in runs(world):
        if run.module == "launch.node":
            found.setdefault(owner(run.pod), []).append(run)
    return [Training(name, nodes, first.get(name), nodes[0].config) for name, nodes in found.items()]


@check
def runtimes(world: World) -> Iterator[str]:
    """A TrainJob's runtime is there, its patches name what this has, and nobody sets what Trainer sets: its webhook refuses that
    in the TrainJob, and silently replaces it in the runtime."""
    for tree in world.of_kind("TrainJob"):
        name, runtime = name_of(tree), runtime_of(world.objects, tree)
        if runtime is None:
            yield f"{name}: no runtime {tree['spec']['runtimeRef']}"
            continue
        for manager in [patch["manager"] for patch in tree["spec"]["runtimePatches"]]:
            if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+/[\w./-]+", manager):
                yield f"{name}: the manager {manager!r} of a patch is no domain/path"
        (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        known = [container["name"] for container in containers(job["template"]["spec"]["template"])]
        for patch in patches(tree):
            spec = patch.get("template", {}).get("spec", {}).get("template", {}).get("spec", {})
            patched = [*spec.get("initContainers", []), *spec.get("containers", [])]
            if patch["name"] != job["name"] or any(container["name"] not in known for container in patched):
                yield f"{name}: patches {patch['name']}, {patched}; the runtime has {job['name']} of {known}"
            if any(container["name"] == "node" and "env" in container for container in patched):
                yield f"{name}: sets variables of node by a patch, they belong to spec.trainer.env"
        yield from _reserved(tree, tree["spec"]["trainer"])
    for tree in world.of_kind("TrainingRuntime"):
        (job,) = tree["spec"]["template"]["spec"]["replicatedJobs"]
        for container in containers(job["template"]["spec"]["template"]):
            yield from _reserved(tree, container)


def _reserved(tree: Object, container: Object) -> Iterator[str]:
    names = [item["name"] for item in container.get("env", []) if item["name"].startswith("PET_")]
    yield from (f"{name_of(tree)}: sets {name}, which is Trainer's" for name in names)


@check
def world_size(world: World) -> Iterator[str]:
    """Pods × processes a pod is what the init container validates for, what batch and lanes can be dealt to, and, where there are
    any, the number of GPUs; and all meet at the first pod."""
    for name in {name_of(tree) for tree in world.of_kind("TrainJob")} - {one.name for one in trainings(world)}:
        yield f"{name}: runs no training"
    for name, every, validate, config in trainings(world):
        pod, envs = every[0].pod["spec"], [variables(run.container) for run in every]
        if lacking := RESERVED - envs[0].keys():
            yield f"{name}: torchrun gets no {sorted(lacking)}"
            continue
        nodes, each = int(envs[0]["PET_NNODES"]), int(envs[0]["PET_NPROC_PER_NODE"])
        gpus = {int(quantity(given.get(GPU, 0))) for given in every[0].container.get("resources", {}).values()}
        for what, told, needed in [
            ("the ranks of its pods", [int(env["PET_NODE_RANK"]) for env in envs], list(range(nodes))),
            ("processes that it is validated for", _planned(validate), nodes * each),
            ("GPUs of a pod", gpus, {each} if any(gpus) else gpus),
            ("PET_MASTER_ADDR", envs[0]["PET_MASTER_ADDR"], f"{pod.get('hostname')}.{pod.get('subdomain')}"),
        ]:
            if told != needed:
                yield f"{name}: {what}: {told}, needs {needed}"
        try:
            check_world_size(config, nodes * each) if config else None
        except WarmDistError as error:
            yield f"{name}: {error}"


def _planned(run: Run | None) -> int:
    """The processes that `train.py --dry-run` plans for: --world-size, else WORLD_SIZE, else 1; 0 if nobody plans."""
    return int(getattr(run.args, "world_size", None) or variables(run.container).get("WORLD_SIZE", 1)) if run else 0


@check
def time_to_stop(world: World) -> Iterator[str]:
    """The preStop hook makes the file that stops a run; the grace period holds its sleep, then torchrun's own 30 s and what
    launch/node.py waits for the mirror."""
    for name, (node, *_), _, config in trainings(world):
        told = commands(node.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}))
        if config and ["touch", config.parallel.preemption_file] not in told:
            yield f"{name}: no preStop hook makes {config.parallel.preemption_file}"
        needed = sum(int(words[1]) for words in told if words[0] == "sleep") + TORCHRUN_S + STOPPED_S
        if (grace := node.pod["spec"].get("terminationGracePeriodSeconds", 30)) < needed:
            yield f"{name}: terminationGracePeriodSeconds is {grace}, a stop takes up to {needed}"


@check
def shared_memory(world: World) -> Iterator[str]:
    """/dev/shm of what trains is memory of a stated size: the default is 64 MB, NCCL and gloo need more."""
    trains = [training.nodes[0].container for training in trainings(world)]
    for label, container, pod in world.containers():
        if container in trains or RAY in labels(pod):
            volumes = {volume["name"]: volume.get("emptyDir") or {} for volume in pod["spec"].get("volumes", [])}
            mounts = [mount["name"] for mount in container.get("volumeMounts", []) if mount["mountPath"] == "/dev/shm"]
            shm = volumes.get(mounts[0], {}) if mounts else {}
            if shm.get("medium") != "Memory" or quantity(shm.get("sizeLimit", 0)) < 2**30:
                yield f"{label}: /dev/shm is no emptyDir of medium Memory with a sizeLimit of 1Gi or more"


@check
def trials_fit(world: World) -> Iterator[str]:
    """A trial of a sweep has room in the workers: else Ray waits for ever. KubeRay tells Ray of limits, or else of requests."""
    for run in runs(world):
        if run.module != "launch.sweep" or run.config is None:
            continue
        trial = run.config[0].trial
        pods = [pod for pod in world.pods if owner(pod) == owner(run.pod) and labels(pod).get(RAY) == "worker"]
        needs = {"cpu": trial.bundle.get("CPU", 0), GPU: trial.bundle.get("GPU", 0)}
        room = sum(all(requests(pod)[key] >= value for key, value in needs.items()) for pod in pods)
        if room < trial.nodes:
            yield f"{owner(run.pod)}: a trial needs {trial.nodes} x {needs}, {room} workers have that"
