"""The manifests as an API server would get them: kustomize's output, by overlay, with and without each component.

A "world" is what lies in one cluster together: an overlay's standing part and its jobs. References are resolved within it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from tests.processes import ROOT

K8S = ROOT / "k8s"
OVERLAYS, COMPONENTS = K8S / "overlays", K8S / "components"

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


@functools.cache
def _kustomize(path: Path) -> str:
    with tempfile.TemporaryDirectory() as home:
        command = [tool("kubectl"), "kustomize", str(path)]
        done = subprocess.run(command, env=offline(home), capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:  # a warning tells of a field that will go
        raise AssertionError(f"kubectl kustomize {path}: {done.stderr.strip()}")
    return done.stdout


def parse(text: str) -> list[Object]:
    """The objects of a stream of YAML documents."""
    return [tree for tree in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if tree]


@functools.cache
def _render(path: Path) -> list[Object]:
    return parse(_kustomize(path))


def render(path: Path) -> list[Object]:
    """`kubectl kustomize PATH`, a copy that may be changed."""
    return copy.deepcopy(_render(path))


def folders(under: Path) -> list[Path]:
    """Every kustomization below a folder."""
    return sorted(path.parent for path in under.rglob("kustomization.yaml"))


def overlays() -> list[str]:
    """The names of the overlays, each of which has a standing part and jobs/."""
    return sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))


def components() -> list[str]:
    """What may be added to an overlay."""
    return sorted(path.parent.name for path in COMPONENTS.glob("*/kustomization.yaml"))


@functools.cache
def _with_component(overlay: str, component: str) -> list[Object]:
    with tempfile.TemporaryDirectory() as folder:
        here = os.path.realpath(folder)
        tree = {
            "resources": [os.path.relpath(OVERLAYS / overlay, here)],
            "components": [os.path.relpath(COMPONENTS / component, here)],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(tree))
        return parse(_kustomize(Path(folder)))


@functools.cache
def _launched(arguments: tuple[str, ...]) -> list[Object]:
    from launch import k8s

    said = io.StringIO()
    argv = mock.patch.object(sys, "argv", ["k8s.py", *arguments])
    with argv, contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        k8s.main()
    return parse(said.getvalue())


def launched(*arguments: str) -> list[Object]:
    """What `launch/k8s.py ARGUMENTS` prints, a copy that may be changed."""
    return copy.deepcopy(_launched(arguments))


def _as_jobsets(jobs: list[Object]) -> list[Object]:
    """The same jobs for a cluster without Trainer: `launch/k8s.py render --jobset` in the place of each TrainJob."""
    out = jobs
    for tree in [tree for tree in jobs if tree["kind"] == "TrainJob"]:
        name, trainer = tree["metadata"]["name"], tree["spec"]["trainer"]
        asked = trainer["resourcesPerNode"]["requests"]
        each = trainer["numProcPerNode"]
        (config,) = [
            tree
            for tree in jobs
            if tree["metadata"]["name"].startswith(f"{name}-") and "train.json" in tree.get("data", {})
        ]
        size = {
            "nodes": trainer["numNodes"],
            "gpus": asked.get("nvidia.com/gpu", 0),
            "processes": each,
            "cpus": int(asked["cpu"]) // each,
            "memory": int(asked["memory"].removesuffix("Gi")) // each,
        }
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / f"{name}.json").write_text(config["data"]["train.json"])
            words = [word for key, value in size.items() for word in (f"--{key}", str(value))]
            made = launched("render", "--jobset", "--config", f"{folder}/{name}.json", "--name", name, *words)
        out = [other for other in out if other not in (tree, config)] + made
    return out


@functools.cache
def _world(name: str) -> list[Object]:
    overlay, _, component = name.partition("+")
    standing = _with_component(overlay, component) if component else _render(OVERLAYS / overlay)
    jobs = _render(OVERLAYS / overlay / "jobs")
    return standing + (_as_jobsets(jobs) if component == "jobset" else jobs)


def worlds() -> list[str]:
    """Names for `world`: each overlay, and each overlay with each component, as `gpu+irsa`."""
    return [*overlays(), *(f"{overlay}+{component}" for overlay in overlays() for component in components())]


def world(name: str) -> list[Object]:
    """All objects of one cluster: an overlay, its jobs, and the component after the `+`. A copy that may be changed."""
    return copy.deepcopy(_world(name))
