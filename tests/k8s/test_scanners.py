"""Trivy and hadolint have nothing to say but what is allowed here, with its reason; and they do see what is wrong.

Trivy knows no custom resource: it gets the pods that come of them.
"""

from __future__ import annotations

import json
import re
import subprocess
from typing import NamedTuple

import pytest

from tests.k8s.crds import is_custom
from tests.k8s.mistakes import MISTAKES, Mistake, plant
from tests.k8s.objects import name_of, owner
from tests.k8s.render import K8S, objects_of, offline, tool, worlds
from tests.k8s.world import World

CONTAINERFILE = K8S / "image" / "Containerfile"


class Allowed(NamedTuple):
    """A rule that some places (a regular expression) may break. reason: why that is right."""

    rule: str
    where: str
    reason: str


ALLOWED = [
    Allowed("KSV-0011", ".*", "no limits of cpu: they throttle a step's data workers at once; requests share the CPUs fairly"),
    Allowed("KSV-0125", ".*", "registry.example.com is a placeholder, and docker.io is where PostgreSQL publishes its image"),
    Allowed("KSV-0020", "StatefulSet/postgres", "999 is the uid that PostgreSQL's image has made for it"),
    Allowed("KSV-0021", "StatefulSet/postgres", "999 is the gid that PostgreSQL's image has made for it"),
    Allowed("DL3008", r"\d+", "the packages are those of the base's release, and Debian's mirrors drop superseded versions"),
    Allowed("DS-0026", "Dockerfile", "a HEALTHCHECK is Docker's: Kubernetes has probes, and four programs share the image"),
]  # fmt: skip


class Finding(NamedTuple):
    """mistake: what was done before it was said; empty of what is as it should be. where: an object, or a line of the Containerfile."""

    mistake: str
    where: str
    rule: str
    text: str

    def is_let_pass(self, by: Allowed) -> bool:
        return self.rule == by.rule and bool(re.fullmatch(by.where, self.where))


def left(found: list[Finding]) -> list[Finding]:
    """What nobody allowed."""
    return [one for one in found if not any(one.is_let_pass(allowed) for allowed in ALLOWED)]


def rules_of(mistake: Mistake) -> set[str]:
    """Those of trivy that must tell of it."""
    return set(re.findall(r"KSV-\d+", mistake.checks))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    """Of the Containerfile, of all worlds, and of what mistakes change in them, in one run: trivy takes a second to begin."""
    folder, places = tmp_path_factory.mktemp("trivy"), {"Dockerfile": ("", "Dockerfile")}
    (folder / "scanned").mkdir()
    (folder / "scanned" / "Dockerfile").write_text(CONTAINERFILE.read_text())
    worlds_of = [("", objects_of(name)) for name in worlds()]
    worlds_of += [(one.what, plant(objects_of(one.world), one)) for one in MISTAKES if rules_of(one)]
    right = set[str]()
    for mistake, objects in worlds_of:
        world = World(objects)  # pods, and core objects that make none
        alone = [(name_of(one), one) for one in objects if not (is_custom(one) or world.made_by(one))]
        for where, tree in alone + [(owner(pod), pod) for pod in world.kinds]:
            if (text := json.dumps(tree)) not in right:
                (folder / "scanned" / f"{len(places)}.json").write_text(text)
                places[f"{len(places)}.json"] = mistake, where
                right |= set() if mistake else {text}
    flags = ["--skip-check-update", "--skip-version-check", "--disable-telemetry", "--quiet", "--format=json"]
    command = [tool("trivy"), "config", *flags, f"--cache-dir={folder / 'cache'}", str(folder / "scanned")]
    done = subprocess.run(command, env=offline(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = {result["Target"]: result.get("Misconfigurations", []) for result in json.loads(done.stdout)["Results"]}
    assert said.keys() == places.keys(), "it has passed over some"
    every = [(*places[name], item["ID"], item["Message"]) for name, items in said.items() for item in items]
    return [Finding(*one) for one in every] + hadolint(CONTAINERFILE.read_text())


def hadolint(text: str) -> list[Finding]:
    """Of a Containerfile's text. Its own `# hadolint ignore=` do not count: what is let pass stands in one place."""
    command, text = [tool("hadolint"), "--format=json", "--no-color", "-"], re.sub(r"# hadolint ignore=.*", "#", text)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return [Finding("", str(item["line"]), item["code"], item["message"]) for item in json.loads(done.stdout)]


def test_scanners_have_nothing_to_say(found: list[Finding]):
    """Fault: a manifest or Containerfile that breaks a rule of Trivy or hadolint, with no reason in ALLOWED."""
    assert [one for one in left(found) if not one.mistake] == []


def test_nothing_is_allowed_that_is_not_there(found: list[Finding]):
    assert [
        allowed for allowed in ALLOWED if not any(one.is_let_pass(allowed) for one in found if not one.mistake)
    ] == []


@pytest.mark.parametrize(
    "mistake", [one for one in MISTAKES if rules_of(one)], ids=lambda one: one.what.replace(" ", "-")
)
def test_trivy_sees_a_mistake(found: list[Finding], mistake: Mistake):
    mine = [one for one in left(found) if one.mistake == mistake.what]
    assert {one.rule for one in mine} == rules_of(mistake)
    assert {one.where for one in mine} == {mistake.told or mistake.target}


def test_hadolint_sees_mistakes():
    text = CONTAINERFILE.read_text()
    for old, new in [
        ("USER 10001:10001", "USER root"), ("FROM ${BASE} AS build", "FROM debian AS build"), ("FROM ${BASE}\n", "FROM debian:latest\n"),
        ("&& rm -rf /var/lib/apt/lists/*", "&& true"), ("--no-install-recommends", ""), ("LABEL ", "MAINTAINER me\nLABEL "),
    ]:  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    rules = {one.rule for one in left(hadolint(text))}
    assert rules >= {"DL3002", "DL3006", "DL3007", "DL3009", "DL3015", "DL4000"}
