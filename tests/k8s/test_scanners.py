"""Trivy and hadolint have nothing to say but what is allowed here, with its reason; and they do see what is wrong."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.k8s.expand import expand
from tests.k8s.objects import containers
from tests.k8s.render import K8S, Object, overlays, world, worlds
from tests.k8s.scan import Finding, hadolint, trivy, write

CONTAINERFILE = K8S / "image" / "Containerfile"


class Allowed(NamedTuple):
    """A rule that some files (a regular expression) may break. reason: why that is right."""

    rule: str
    where: str
    reason: str


ALLOWED = [
    Allowed(
        "KSV-0011",
        ".*",
        "no limits of cpu: they throttle a step's data workers at once; requests share the CPUs fairly",
    ),
    Allowed(
        "KSV-0125", ".*", "registry.example.com is a placeholder, and docker.io is where PostgreSQL publishes its image"
    ),
    Allowed(
        "KSV-0020",
        r".*/(statefulset-postgres|pod-postgres-0)\.yaml",
        "999 is the uid that PostgreSQL's image has made for it",
    ),
    Allowed(
        "KSV-0021",
        r".*/(statefulset-postgres|pod-postgres-0)\.yaml",
        "999 is the gid that PostgreSQL's image has made for it",
    ),
    Allowed(
        "DL3008", r"\d+", "the packages are those of the base's release, and Debian's mirrors drop superseded versions"
    ),
    Allowed(
        "DS-0026", "Dockerfile", "a HEALTHCHECK is Docker's: Kubernetes has probes, and four programs share the image"
    ),
]


def left(found: list[Finding]) -> list[Finding]:
    """What nobody allowed."""
    return [
        one
        for one in found
        if not any(one.rule == rule and re.fullmatch(where, one.where) for rule, where, _ in ALLOWED)
    ]


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Finding], set[str], set[str]]:
    """Of all overlays and components at once, and of the Containerfile: findings, files looked at, files written."""
    folder = tmp_path_factory.mktemp("trivy") / "scanned"
    known: set[str] = set()
    for name in worlds():
        objects = world(name)
        place = folder / f"overlay-{name.replace('+', '-')}"  # trivy passes over folders named dev
        write(place, objects, expand(objects), known)
    (folder / "Dockerfile").write_text(CONTAINERFILE.read_text())
    found, looked_at = trivy(folder)
    return (
        found + hadolint(CONTAINERFILE.read_text()),
        looked_at,
        {str(path.relative_to(folder)) for path in folder.rglob("*.*")} | {"Dockerfile"},
    )


def test_scanners_have_nothing_to_say(scanned):
    assert left(scanned[0]) == []


def test_scanners_have_looked_at_everything(scanned):
    _, looked_at, written = scanned
    assert written - looked_at == set()
    assert len([name for name in looked_at if "/pod-" in name]) > 10


def test_nothing_is_allowed_that_is_not_there(scanned):
    idle = [
        allowed
        for allowed in ALLOWED
        if not any(one.rule == allowed.rule and re.fullmatch(allowed.where, one.where) for one in scanned[0])
    ]
    assert idle == []


def _context(**changes: Any) -> Any:
    def change(pod: Object) -> None:
        for container in containers(pod):
            container["securityContext"] |= changes

    return change


PLANTED = {
    "KSV-0001": _context(allowPrivilegeEscalation=True),
    "KSV-0014": _context(readOnlyRootFilesystem=False),
    "KSV-0017": _context(privileged=True),
    "KSV-0003": _context(capabilities={}),
    "KSV-0012": lambda pod: pod["spec"]["securityContext"].update(runAsNonRoot=False),
    "KSV-0009": lambda pod: pod["spec"].update(hostNetwork=True),
    "KSV-0023": lambda pod: pod["spec"]["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    "KSV-0013": lambda pod: pod["spec"]["containers"][0].update(image="registry.example.com/warm-dist:latest"),
    "KSV-0018": lambda pod: pod["spec"]["containers"][0]["resources"].pop("limits"),
    "KSV-0104": lambda pod: pod["spec"]["securityContext"].update(seccompProfile={"type": "Unconfined"}),
}
"""Rule → what a person did to the pods of a training. A TrainJob shows trivy nothing of it: the pods are made by expand."""


def test_trivy_sees_mistakes_in_the_pods_of_a_training(tmp_path: Path):
    (pod, *_) = [
        pod
        for pod in expand(world(overlays()[-1]))
        if "validate" in {container["name"] for container in containers(pod)}
    ]
    broken = []
    for rule, change in PLANTED.items():
        one = copy.deepcopy(pod)
        one["metadata"]["name"] = rule.lower()
        one["metadata"]["ownerReferences"][0]["name"] = rule.lower()  # a kind of its own
        change(one)
        broken.append(one)
    write(tmp_path / "planted", [], broken, set())
    found = left(trivy(tmp_path / "planted")[0])
    missed = {
        rule
        for rule in PLANTED
        if not any(one.rule == rule and one.where == f"pod-{rule.lower()}.yaml" for one in found)
    }
    assert missed == set()


@pytest.mark.parametrize(("rule", "old", "new"), [
    ("DL3002", "USER 10001:10001", "USER root"),
    ("DL3006", "FROM ${BASE} AS build", "FROM debian AS build"),
    ("DL3007", "FROM ${BASE} AS build", "FROM debian:latest AS build"),
    ("DL3009", "&& rm -rf /var/lib/apt/lists/*", "&& true"),
    ("DL3015", "--no-install-recommends", ""),
    ("DL4000", "LABEL ", "MAINTAINER me\nLABEL "),
])  # fmt: skip
def test_hadolint_sees_mistakes(rule: str, old: str, new: str):
    text = CONTAINERFILE.read_text()
    assert old in text
    assert rule in {one.rule for one in left(hadolint(text.replace(old, new)))}
