"""Scanners that know no custom resource: trivy over the objects and over the pods that come of them, hadolint over the image."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.k8s.objects import distinct
from tests.k8s.render import Object, offline, tool


class Finding(NamedTuple):
    """rule: the scanner's name for it. where: file. text: its own words."""

    rule: str
    where: str
    text: str


def write(folder: Path, objects: list[Object], pods: list[Object], known: set[str]) -> None:
    """One file an object, one a kind of pod. Pods without owner: trivy passes over those that have one.

    known: texts that have been written already, and are not again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for tree in [*objects, *map(_alone, distinct(pods))]:
        text = yaml.safe_dump(tree)
        if text not in known:
            name = f"{tree['kind']}-{tree['metadata']['name']}".lower()
            (folder / f"{name}.yaml").write_text(text)
            known.add(text)


def _alone(pod: Object) -> Object:
    metadata = {key: value for key, value in pod["metadata"].items() if key != "ownerReferences"}
    return {**pod, "metadata": metadata}


def trivy(folder: Path) -> tuple[list[Finding], set[str]]:
    """(findings of any severity, the files that were looked at)."""
    flags = ["--skip-check-update", "--skip-version-check", "--disable-telemetry", "--quiet", "--format=json"]
    command = [tool("trivy"), "config", *flags, f"--cache-dir={folder.parent / 'cache'}", str(folder)]
    done = subprocess.run(command, env=offline(folder.parent), capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"trivy: {done.stderr.strip()}")
    results = json.loads(done.stdout).get("Results", [])
    found = [
        Finding(item["ID"], result["Target"], f"{item['Severity']}: {item['Message']}")
        for result in results
        for item in result.get("Misconfigurations", [])
    ]
    return found, {result["Target"] for result in results}


def hadolint(text: str) -> list[Finding]:
    """Of a Containerfile's text. Its own `# hadolint ignore=` do not count: what is let pass stands in one place."""
    done = subprocess.run(
        [tool("hadolint"), "--format=json", "--no-color", "-"],
        input=re.sub(r"# hadolint ignore=.*", "#", text),
        capture_output=True,
        text=True,
        check=False,
    )
    return [
        Finding(item["code"], str(item["line"]), f"{item['level']}: {item['message']}")
        for item in json.loads(done.stdout)
    ]
