"""What becomes of a job when a container ends so: the Job controller's podFailurePolicy, then JobSet's failurePolicy.

Sources: kubernetes/pkg/controller/job/pod_failure_policy.go (rules in order, its messages) and jobset/pkg/controllers/
failure_policy.go (rules in order; without a match RestartJobSet, which counts; without a policy the set fails).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.objects import containers, find, name_of, of_kind, space_of
from tests.k8s.programs import commands, program
from tests.k8s.render import Object
from tests.k8s.trainer import jobset_of
from warm_dist import errors

FAIL, RESTART, FREE, AGAIN = "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "the pod is made anew"
STOPPED = errors.Stopped.exit_code
HOPELESS = [
    error.exit_code
    for error in (
        errors.ConfigError,
        errors.DataError,
        errors.CheckpointError,
        errors.NumericsError,
        errors.WorldSizeError,
    )
]
# (exit code, DisruptionTarget) → what must come of it. 137: kill -9, by the kernel for memory or by a kubelet out of patience.
TRAINING = {
    **{(code, False): FAIL for code in HOPELESS},
    (STOPPED, False): FREE,
    (STOPPED, True): FREE,
    (137, True): FREE,
    (143, True): FREE,
    (errors.EXIT_UNEXPECTED, False): RESTART,
    (errors.UnreachableError.exit_code, False): RESTART,
    (137, False): RESTART,
}
VALIDATING = {
    (errors.ConfigError.exit_code, False): FAIL,
    (errors.WorldSizeError.exit_code, False): FAIL,
    (143, True): FREE,
    (137, False): RESTART,
}
PACKING = {
    **{(error.exit_code, False): FAIL for error in (errors.ConfigError, errors.DataError, errors.BucketError)},
    (137, True): AGAIN,
    (errors.UnreachableError.exit_code, False): AGAIN,
    (137, False): AGAIN,
}


def jobsets(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every JobSet with the name of what a person wrote: those that stand there, and those of TrainJobs."""
    for tree in of_kind(objects, "JobSet"):
        yield name_of(tree), tree
    for tree in of_kind(objects, "TrainJob"):
        runtime = find(objects, "TrainingRuntime", tree["spec"]["runtimeRef"]["name"], space_of(tree))
        if runtime is not None:
            yield name_of(tree), jobset_of(tree, runtime)


def _specs(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """(name, JobSpec) of every Job, however it is made."""
    for tree in of_kind(objects, "Job"):
        yield name_of(tree), tree["spec"]
    for tree in of_kind(objects, "CronJob"):
        yield name_of(tree), tree["spec"]["jobTemplate"]["spec"]
    for name, tree in jobsets(objects):
        for job in tree["spec"]["replicatedJobs"]:
            yield name, job["template"]["spec"]


def _rules(spec: Object) -> list[Object]:
    return list(spec.get("podFailurePolicy", {}).get("rules", []))


def _matches(rule: Object, container: str, code: int, disrupted: bool) -> bool:
    if "onExitCodes" in rule:
        wanted = rule["onExitCodes"]
        if wanted.get("containerName", container) != container or code == 0:
            return False
        return (code in wanted["values"]) == (wanted["operator"] == "In")
    conditions = rule.get("onPodConditions", [])
    return disrupted and any(c["type"] == "DisruptionTarget" and c.get("status", "True") == "True" for c in conditions)


def message(rule: Object, index: int, pod: str, container: str, code: int) -> str:
    """The Job's failure message, as the Job controller words it."""
    if "onExitCodes" in rule:
        return (
            f"Container {container} for pod {pod} failed with exit code {code} matching FailJob rule at index {index}"
        )
    return f"Pod {pod} has condition DisruptionTarget matching FailJob rule at index {index}"


def outcome(jobset: Object, job: Object, container: str, code: int, disrupted: bool) -> str:
    """FAIL, RESTART or FREE, or AGAIN if the Job goes on with another pod."""
    spec = job["template"]["spec"]
    pod = f"{space_of(jobset)}/{jobset['metadata']['name']}-{job['name']}-0-0-x7k2p"
    reason, text = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(_rules(spec)):
        if _matches(rule, container, code, disrupted):
            if rule["action"] == "Ignore":
                return AGAIN
            if rule["action"] == "FailJob":
                reason, text = "PodFailurePolicy", message(rule, index, pod, container, code)
            break
    if reason == "BackoffLimitExceeded" and spec.get("backoffLimit", 6) > 0:
        return AGAIN
    policy = jobset["spec"].get("failurePolicy")
    if policy is None:
        return FAIL
    return next(
        (rule["action"] for rule in policy.get("rules", []) if _applies(rule, job["name"], reason, text)), RESTART
    )


def _applies(rule: Object, job: str, reason: str, text: str) -> bool:
    """An empty list is met by anything."""
    reasons, patterns = rule.get("onJobFailureReasons", []), rule.get("onJobFailureMessagePatterns", [])
    jobs = rule.get("targetReplicatedJobs", [])
    if (reasons and reason not in reasons) or (jobs and job not in jobs):
        return False
    return not patterns or any(re.search(pattern, text) for pattern in patterns)


def _expected(container: Object, first: bool) -> dict[tuple[int, bool], str]:
    """What must come of each end of a container; nothing for one that is not ours."""
    modules = {found[0] for argv in commands(container) if (found := program(argv))}
    if "data_pipelines.pack" in modules:
        return PACKING
    if modules & {"launch.train", "launch.node"}:
        return VALIDATING if first else TRAINING
    return {}


def failure_outcomes(objects: list[Object], pods: list[Object]) -> list[str]:
    """Disruptions are free, what would end so again is not tried again, everything else is tried again a few times."""
    messages = []
    for name, tree in jobsets(objects):
        for job in tree["spec"]["replicatedJobs"]:
            pod = job["template"]["spec"]["template"]
            for container in containers(pod):
                first = container not in pod["spec"]["containers"]
                for (code, disrupted), wanted in _expected(container, first).items():
                    found = outcome(tree, job, container["name"], code, disrupted)
                    if found != wanted:
                        end = f"exit code {code} of {container['name']}" + (" after a disruption" if disrupted else "")
                        messages.append(f"{name}: {end}: {found}, needs {wanted}")
                    if found == RESTART and not tree["spec"]["failurePolicy"].get("maxRestarts", 0):
                        messages.append(
                            f"{name}: maxRestarts is 0, exit code {code} of {container['name']} would end it"
                        )
    return messages


def failure_rules(objects: list[Object], pods: list[Object]) -> list[str]:
    """podFailurePolicy speaks of containers that exist, and of pods that are not restarted in place; every pattern can match."""
    messages = []
    for name, spec in _specs(objects):
        template, rules = spec["template"], _rules(spec)
        known = [container["name"] for container in containers(template)]
        names = [
            rule["onExitCodes"]["containerName"] for rule in rules if "containerName" in rule.get("onExitCodes", {})
        ]
        messages += [
            f"{name}: podFailurePolicy speaks of {one}, the pod has {known}" for one in names if one not in known
        ]
        if rules and template["spec"].get("restartPolicy") != "Never":
            messages.append(f"{name}: a podFailurePolicy needs restartPolicy Never")
    for name, tree in jobsets(objects):
        said = _possible(tree)
        for rule in tree["spec"].get("failurePolicy", {}).get("rules", []):
            for pattern in rule.get("onJobFailureMessagePatterns", []):
                if not any(re.search(pattern, text) for text in said):
                    messages.append(f"{name}: nothing that can be said matches {pattern!r} of the rule {rule['name']}")
    return messages


def _possible(tree: Object) -> list[str]:
    """One message for every FailJob rule of a JobSet."""
    said: list[Any] = []
    for job in tree["spec"]["replicatedJobs"]:
        for index, rule in enumerate(_rules(job["template"]["spec"])):
            if rule["action"] == "FailJob":
                codes = rule.get("onExitCodes", {})
                container, code = codes.get("containerName", "node"), (codes.get("values") or [1])[0]
                said.append(message(rule, index, "space/pod-x7k2p", container, code))
    return said
