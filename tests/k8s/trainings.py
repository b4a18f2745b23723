"""What a training needs beyond being valid: the numbers of its world, what Trainer reserves, time to stop, shared memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from tests.k8s.objects import containers, distinct, find, name_of, of_kind, owner, quantity, space_of
from tests.k8s.programs import Run, commands, config_of, parse, runs, trial_of, variables
from tests.k8s.render import Object
from tests.k8s.trainer import RESERVED
from warm_dist.config.batch import check_world_size
from warm_dist.errors import WarmDistError
from warm_dist.kubernetes.node import STOPPED_S

GPU = "nvidia.com/gpu"
TORCHRUN_S = 30  # torch.distributed.elastic gives its workers so long after SIGTERM, then SIGKILL


class Training(NamedTuple):
    """The pods of one training, and what its first runs."""

    name: str
    pods: list[Object]
    node: Run
    validate: Run | None

    @property
    def env(self) -> dict[str, str]:
        return variables(self.node.container)


def trainings(objects: list[Object], pods: list[Object]) -> Iterator[Training]:
    """Every TrainJob's and every JobSet's that runs launch/node.py, or launch/train.py in earnest."""
    found: dict[str, list[Run]] = {}
    for run in runs(objects, pods):
        if run.module in ("launch.node", "launch.train"):
            found.setdefault(owner(run.pod), []).append(run)
    for name, mine in found.items():
        main = [run for run in mine if run.container in run.pod["spec"]["containers"]]
        first = [run for run in mine if run.container in run.pod["spec"].get("initContainers", [])]
        if main:
            yield Training(name, [run.pod for run in main], main[0], first[0] if first else None)


def runtimes(objects: list[Object], pods: list[Object]) -> list[str]:
    """A TrainJob's runtime exists in its namespace, and its patches name jobs and containers that this has."""
    messages = []
    for tree in of_kind(objects, "TrainJob"):
        reference = tree["spec"]["runtimeRef"]
        kind = reference.get("kind", "ClusterTrainingRuntime")
        runtime = find(objects, kind, reference["name"], space_of(tree) if kind == "TrainingRuntime" else "")
        if runtime is None:
            messages.append(f"{name_of(tree)}: no {kind} {reference['name']}")
            continue
        jobs = {
            job["name"]: job["template"]["spec"]["template"]["spec"]
            for job in runtime["spec"]["template"]["spec"]["replicatedJobs"]
        }
        for patch in tree["spec"].get("runtimePatches", []):
            if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+/[\w./-]+", patch["manager"]):
                messages.append(f"{name_of(tree)}: the manager {patch['manager']!r} of a patch is no domain/path")
            for job in (
                patch.get("trainingRuntimeSpec", {}).get("template", {}).get("spec", {}).get("replicatedJobs", [])
            ):
                if job["name"] not in jobs:
                    messages.append(
                        f"{name_of(tree)}: patches the job {job['name']}, {name_of(runtime)} has {sorted(jobs)}"
                    )
                    continue
                messages += _patched(tree, job, jobs[job["name"]])
    return messages


def _patched(tree: Object, job: Object, pod: Object) -> Iterator[str]:
    """As Trainer's webhook refuses."""
    patch = job.get("template", {}).get("spec", {}).get("template", {}).get("spec", {})
    for key in ("initContainers", "containers"):
        known = {container["name"] for container in pod.get(key, [])}
        for container in patch.get(key, []):
            if container["name"] not in known:
                yield f"{name_of(tree)}: patches the container {container['name']}, the runtime has {sorted(known)}"
            elif container["name"] == "node" and container.get("env"):
                yield f"{name_of(tree)}: sets variables of node by a patch, they belong to spec.trainer.env"


def reserved(objects: list[Object], pods: list[Object]) -> list[str]:
    """Nobody sets what Trainer sets: its webhook refuses that in the TrainJob, and silently replaces it in the runtime."""
    messages = []
    for tree in of_kind(objects, "TrainJob"):
        names = [item["name"] for item in tree["spec"].get("trainer", {}).get("env", [])]
        messages += [f"{name_of(tree)}: sets {name}, which is Trainer's" for name in names if name.startswith("PET_")]
    for tree in of_kind(objects, "TrainingRuntime", "ClusterTrainingRuntime"):
        for job in tree["spec"]["template"]["spec"]["replicatedJobs"]:
            for container in containers(job["template"]["spec"]["template"]):
                names = [item["name"] for item in container.get("env", [])]
                messages += [
                    f"{name_of(tree)}: sets {name}, which is Trainer's" for name in names if name.startswith("PET_")
                ]
    return messages


def world_size(objects: list[Object], pods: list[Object]) -> list[str]:
    """Pods × processes a pod is what the init container validates for, and the config's batch and lanes can be dealt to it."""
    names = {training.name for training in trainings(objects, pods)}
    messages = [
        f"{name_of(tree)}: runs no training" for tree in of_kind(objects, "TrainJob") if name_of(tree) not in names
    ]
    for training in trainings(objects, pods):
        lacking = [name for name in RESERVED if name not in training.env]
        if lacking:
            messages.append(f"{training.name}: torchrun gets no {', '.join(lacking)}")
            continue
        nodes, each = int(training.env["PET_NNODES"]), int(training.env["PET_NPROC_PER_NODE"])
        ranks = sorted(int(variables(_node(pod, training))["PET_NODE_RANK"]) for pod in training.pods)
        if ranks != list(range(nodes)):
            messages.append(f"{training.name}: PET_NNODES is {nodes}, its pods are the nodes {ranks}")
        if training.validate is None:
            messages.append(f"{training.name}: no init container validates its config")
            continue
        told = _planned(training.validate)
        if told != nodes * each:
            messages.append(f"{training.name}: validated for {told} processes, it has {nodes} nodes x {each}")
        config = config_of(objects, training.node)
        try:
            if config is not None:
                check_world_size(config, nodes * each)
        except WarmDistError as error:
            messages.append(f"{training.name}: {error}")
    return messages


def _node(pod: Object, training: Training) -> Object:
    (found,) = [item for item in pod["spec"]["containers"] if item["name"] == training.node.container["name"]]
    return dict(found)


def _planned(run: Run) -> int:
    """The processes that `train.py --dry-run` plans for: --world-size, else WORLD_SIZE, else 1."""
    try:
        given = parse(run.module, run.arguments).world_size
    except ValueError:
        given = None
    return int(given or variables(run.container).get("WORLD_SIZE", "1"))


def gpus(objects: list[Object], pods: list[Object]) -> list[str]:
    """A pod that asks for GPUs has one for every process, as request and limit."""
    messages = []
    for training in trainings(objects, pods):
        resources = training.node.container.get("resources", {})
        asked = {kind: int(quantity(resources.get(kind, {}).get(GPU, 0))) for kind in ("requests", "limits")}
        each = int(training.env.get("PET_NPROC_PER_NODE", 0))
        if any(asked.values()) and set(asked.values()) != {each}:
            messages.append(f"{training.name}: {asked} of {GPU} for {each} processes a pod")
    return messages


def master(objects: list[Object], pods: list[Object]) -> list[str]:
    """The address that ranks meet at is the first pod's, as its headless service names it."""
    messages = []
    for training in trainings(objects, pods):
        spec = training.pods[0]["spec"]
        name = f"{spec.get('hostname')}.{spec.get('subdomain')}"
        if training.env.get("PET_MASTER_ADDR") not in (name, None):
            messages.append(
                f"{training.name}: PET_MASTER_ADDR is {training.env['PET_MASTER_ADDR']}, its first pod is {name}"
            )
    return messages


def time_to_stop(objects: list[Object], pods: list[Object]) -> list[str]:
    """The grace period holds the preStop hook's sleep, then torchrun's own 30 s and what launch/node.py waits for the mirror."""
    messages = []
    for training in trainings(objects, pods):
        for pod in distinct(training.pods):
            grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
            needed = _sleep(_node(pod, training)) + TORCHRUN_S + STOPPED_S
            if grace < needed:
                messages.append(
                    f"{training.name}: terminationGracePeriodSeconds is {grace}, a stop takes up to {needed}"
                )
    return messages


def _sleep(container: Object) -> int:
    """The seconds that a preStop hook sleeps."""
    hook = container.get("lifecycle", {}).get("preStop", {})
    argv = commands({"command": hook.get("exec", {}).get("command", [])})
    slept = sum(int(words[1].rstrip("s")) for words in argv if words[0] == "sleep")
    return slept + int(hook.get("sleep", {}).get("seconds", 0))


def shared_memory(objects: list[Object], pods: list[Object]) -> list[str]:
    """/dev/shm of what trains is memory of a stated size: the default is 64 MB, NCCL and gloo need more."""
    messages = []
    places = [
        (training.name, pod, _node(pod, training))
        for training in trainings(objects, pods)
        for pod in distinct(training.pods)
    ]
    places += [
        (owner(pod), pod, pod["spec"]["containers"][0])
        for pod in distinct(pods)
        if "ray.io/node-type" in pod["metadata"]["labels"]
    ]
    for name, pod, container in places:
        volumes = {volume["name"]: volume.get("emptyDir") for volume in pod["spec"].get("volumes", [])}
        mounts = [mount for mount in container.get("volumeMounts", []) if mount["mountPath"] == "/dev/shm"]
        shm = volumes.get(mounts[0]["name"]) if mounts else None
        if not shm or shm.get("medium") != "Memory" or quantity(shm.get("sizeLimit", 0)) < 2**30:
            messages.append(
                f"{name}: /dev/shm of {container['name']} is no emptyDir of medium Memory with a sizeLimit of 1Gi or more"
            )
    return messages


def trials_fit(objects: list[Object], pods: list[Object]) -> list[str]:
    """A trial of a sweep has room in the workers: else Ray waits for ever. KubeRay tells Ray of limits, or else of requests."""
    messages = []
    for run in runs(objects, pods):
        trial = trial_of(objects, run) if run.module == "launch.sweep" else None
        if trial is None:
            continue
        room = []
        for pod in pods:
            if owner(pod) == owner(run.pod) and pod["metadata"]["labels"].get("ray.io/node-type") == "worker":
                given = pod["spec"]["containers"][0].get("resources", {})
                every = {**given.get("requests", {}), **given.get("limits", {})}
                has = {"CPU": quantity(every.get("cpu", 0)), "GPU": quantity(every.get(GPU, 0))}
                room.append(all(has[name] >= value for name, value in trial.bundle.items()))
        if sum(room) < trial.nodes:
            messages.append(
                f"{owner(run.pod)}: a trial needs {trial.nodes} x {trial.bundle}, {sum(room)} workers have that"
            )
    return messages


def image_command(objects: list[Object], pods: list[Object]) -> list[str]:
    """Containers say what they run: the image has no entrypoint. Ray's are started by KubeRay."""
    return [
        f"{owner(pod)}: {container['name']} has no command"
        for pod in distinct(pods)
        for container in containers(pod)
        if not container.get("command")
        and owner(pod).split("/")[0] != "RayJob"
        and re.search(r"/warm-dist[:@]", container.get("image", ""))
    ]
