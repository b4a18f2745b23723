"""The manifests as an API server would get them: kustomize's output, by overlay, with and without each component.

Objects are shared and never changed: equal ones are one, so that what is known of an object is known in every world.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
import yaml

from tests.support.processes import ROOT

K8S = ROOT / "k8s"
OVERLAYS = K8S / "overlays"

Object = dict[str, Any]


def tool(name: str) -> str:
    """An executable that a package of the `test` extra brings, beside the interpreter."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: make install")
    return str(path)


def offline(home: Path | str) -> dict[str, str]:
    """An environment in which nothing can be fetched: a remote base or a policy bundle fails at once."""
    nowhere = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "HTTP", "HTTPS")}
    return {"PATH": os.environ["PATH"], "HOME": str(home), "GIT_ALLOW_PROTOCOL": "none", **nowhere}


def lacks(problem: str) -> NoReturn:
    """A loud skip where something cannot be tested, in CI a failure."""
    pytest.fail(problem) if os.environ.get("CI") == "true" else pytest.skip(problem)


_shared = functools.cache(json.loads)


def parse(text: str) -> list[Object]:
    """The objects of a stream of YAML documents."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [_shared(json.dumps(tree)) for tree in yaml.load_all(text, Loader=loader) if tree]


@functools.cache
def _render(path: Path) -> list[Object]:
    with tempfile.TemporaryDirectory() as home:
        command = [tool("kubectl"), "kustomize", str(path)]
        done = subprocess.run(command, env=offline(home), capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:  # a warning tells of a field that will go
        raise AssertionError(f"kubectl kustomize {path}: {done.stderr.strip()}")
    return parse(done.stdout)


def render(path: Path) -> list[Object]:
    """`kubectl kustomize PATH`."""
    return list(_render(path))


def told(*arguments: str) -> tuple[list[Object], str]:
    """What `launch/k8s.py ARGUMENTS` prints: the objects on stdout, and stderr. Raises its errors."""
    from launch import k8s

    words = [str(ROOT / word) if word.startswith("configs/") else word for word in arguments]
    out, err, argv = io.StringIO(), io.StringIO(), mock.patch.object(sys, "argv", ["k8s.py", *words])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        k8s.main()
    return parse(out.getvalue()), err.getvalue()


def launched(*arguments: str) -> list[Object]:
    """The objects alone."""
    return told(*arguments)[0]


def documented() -> list[tuple[list[str], Path]]:
    """(arguments, file) of each `python launch/k8s.py … > k8s/overlays/…` in k8s/README.md."""
    found = re.findall(r"^\S*python launch/k8s\.py (.*?) > (k8s/overlays/\S+)$", (K8S / "README.md").read_text(), re.M)
    return [(shlex.split(arguments), ROOT / path) for arguments, path in found]


@functools.cache
def objects_of(world: str) -> list[Object]:
    """All objects of one cluster: an overlay, its jobs, and the component after a `+`, as in `gpu+irsa`."""
    overlay, _, component = world.partition("+")
    standing, jobs = OVERLAYS / overlay, render(OVERLAYS / overlay / "jobs")
    if component == "jobset":  # for a cluster without Trainer: the same training, printed as a JobSet
        words = next(words for words, path in documented() if path == standing / "jobs" / "train.yaml")
        jobs = [tree for tree in jobs if tree["kind"] != "TrainJob"] + launched(*words, "--jobset")[-1:]
    if not component:
        return render(standing) + jobs
    with tempfile.TemporaryDirectory() as folder:
        parts = {"resources": standing, "components": K8S / "components" / component}
        tree = {key: [os.path.relpath(path, os.path.realpath(folder))] for key, path in parts.items()}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(tree))
        return render(Path(folder)) + jobs


def worlds() -> list[str]:
    """Names for `objects_of`: each overlay, alone and with each component."""
    overlays = sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))
    components = sorted(path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml"))
    return [*overlays, *(f"{overlay}+{component}" for overlay in overlays for component in components)]
