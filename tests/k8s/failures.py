"""What becomes of a job when a container ends so: the Job controller's podFailurePolicy, then JobSet's failurePolicy.

Sources: kubernetes/pkg/controller/job/pod_failure_policy.go (rules in order, its messages) and jobset/pkg/controllers/
failure_policy.go (rules in order; without a match RestartJobSet, which counts; without a policy the set fails).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.k8s.expand import runtime_of
from tests.k8s.objects import containers, name_of
from tests.k8s.programs import commands, program
from tests.k8s.render import Object
from tests.k8s.trainer import jobset_of
from tests.k8s.world import World, check
from warm_dist import errors

FAIL, RESTART, FREE, AGAIN = "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "the pod is made anew"
CONFIG, WORLD, DATA, BUCKET, CHECKPOINT, NUMERICS, STOPPED, UNREACHABLE = (
    error.exit_code
    for error in (
        *(errors.ConfigError, errors.WorldSizeError, errors.DataError, errors.BucketError, errors.CheckpointError),
        *(errors.NumericsError, errors.Stopped, errors.UnreachableError),
    )
)
# What must come of exit codes, and of those with a DisruptionTarget. 137: kill -9, by the kernel for memory or by a kubelet out of patience.
TRAINING = {
    FAIL: ([CONFIG, WORLD, DATA, CHECKPOINT, NUMERICS], []),
    FREE: ([STOPPED], [STOPPED, 137, 143]),
    RESTART: ([errors.EXIT_UNEXPECTED, UNREACHABLE, 137], []),
}
VALIDATING = {FAIL: ([CONFIG, WORLD], []), FREE: ([], [143]), RESTART: ([137], [])}
PACKING = {FAIL: ([CONFIG, DATA, BUCKET], []), AGAIN: ([UNREACHABLE, 137], [137])}
EXPECTED = {"launch.node": TRAINING, "launch.train": VALIDATING, "data_pipelines.pack": PACKING}


def jobsets(world: World) -> Iterator[tuple[str, Object]]:
    """Every JobSet with the name of what a person wrote: those that stand there, and those of TrainJobs."""
    for tree in world.of_kind("JobSet", "TrainJob"):
        runtime = tree["kind"] == "TrainJob" and runtime_of(world.objects, tree)
        if tree["kind"] == "JobSet" or runtime:
            yield name_of(tree), jobset_of(tree, runtime) if runtime else tree


def outcome(jobset: Object, job: Object, container: str, code: int, disrupted: bool) -> str:
    """FAIL, RESTART or FREE, or AGAIN if the Job goes on with another pod."""
    spec, reason, text = job["template"]["spec"], "BackoffLimitExceeded", ""
    for index, rule in enumerate(spec.get("podFailurePolicy", {}).get("rules", [])):
        met, said = disrupted, "Pod x has condition DisruptionTarget"
        if wanted := rule.get("onExitCodes"):
            mine = wanted.get("containerName", container) == container
            met = mine and (code in wanted["values"]) == (wanted["operator"] == "In")
            said = f"Container {container} for pod x failed with exit code {code}"
        if met and rule["action"] == "Ignore":
            return AGAIN
        if met:
            reason, text = "PodFailurePolicy", f"{said} matching FailJob rule at index {index}"
            break
    if reason == "BackoffLimitExceeded" and spec.get("backoffLimit", 6) > 0:
        return AGAIN
    if "failurePolicy" not in jobset["spec"]:
        return FAIL
    for rule in jobset["spec"]["failurePolicy"].get("rules", []):
        met = reason in rule.get("onJobFailureReasons", [reason]) and job["name"] in rule.get(
            "targetReplicatedJobs", [job["name"]]
        )
        if met and any(re.search(pattern, text) for pattern in rule.get("onJobFailureMessagePatterns", [""])):
            return str(rule["action"])
    return RESTART


@check
def failure_outcomes(world: World) -> Iterator[str]:
    """Disruptions are free, what would end so again is not tried again, everything else is tried again a few times."""
    for name, jobset in jobsets(world):
        restarts = jobset["spec"].get("failurePolicy", {}).get("maxRestarts", 0)
        for job in jobset["spec"]["replicatedJobs"]:
            pod = job["template"]["spec"]["template"]
            if "podFailurePolicy" in job["template"]["spec"] and pod["spec"].get("restartPolicy") != "Never":
                yield f"{name}: a podFailurePolicy needs restartPolicy Never"
            for container in containers(pod):
                modules = [found[0] for argv in commands(container) if (found := program(argv))]
                for wanted, ends in EXPECTED.get(modules[0], {}).items() if modules else ():
                    for code, after in [*((code, False) for code in ends[0]), *((code, True) for code in ends[1])]:
                        found = outcome(jobset, job, container["name"], code, after)
                        if found != wanted or (found == RESTART and not restarts):
                            end = f"exit code {code} of {container['name']}" + " after a disruption" * after
                            yield f"{name}: {end}: {found} (maxRestarts {restarts}), needs {wanted}"
