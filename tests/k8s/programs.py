"""What containers run, read as their shell and our own command lines would read it."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.k8s.objects import containers, owner, space_of, variables
from tests.k8s.render import Object
from tests.k8s.world import World, check
from tests.support.processes import ROOT
from warm_dist.config.run import load_config
from warm_dist.config.sweep import load_sweep
from warm_dist.errors import WarmDistError
from warm_dist.sweeps.trials import trials

CODE = "/opt/warm-dist"  # WORKDIR of k8s/image/Containerfile
PROGRAMS = ("launch.train", "launch.node", "launch.sweep", "data_pipelines.pack")
STUB = '#!/bin/sh\nprintf "%s\\0" "${0##*/}" "$@"\necho\n'  # a program that tells its name and words


class Run(NamedTuple):
    """One of our programs in a container. config: what it loads, of a sweep (SweepConfig, base). problem: why it would not start."""

    pod: Object
    container: Object
    module: str
    args: argparse.Namespace
    config: Any
    problem: str


class _Parsed(Exception):
    """Ends a main() that has read its command line, where it would load its config."""


@functools.cache
def shell(argv: tuple[str, ...], env: tuple[tuple[str, str], ...]) -> list[list[str]]:
    """The commands that a shell runs, as a real one does, in which programs do nothing but tell."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("python", "sleep", "touch"):
            path = Path(folder) / name
            path.write_text(STUB)
            path.chmod(0o755)
        command = [f"/bin/{Path(argv[0]).name}", *argv[1:]]
        done = subprocess.run(command, env={"PATH": folder, **dict(env)}, capture_output=True, text=True, check=False)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


def commands(container: Object) -> list[list[str]]:
    """What a container starts with; nothing if its image or an operator decides."""
    argv = [*container.get("command", []), *container.get("args", [])]
    if not container.get("command"):
        return []
    return shell(tuple(argv), tuple(variables(container).items())) if Path(argv[0]).name in ("sh", "bash") else [argv]


def program(argv: list[str], folder: str = CODE) -> tuple[str, list[str]] | None:
    """(module, arguments) if a command runs python with something of ours. folder: where it does."""
    if Path(argv[0]).name != "python" or len(argv) < 2 or argv[1] == "-c":
        return None
    if argv[1] == "-m":
        return argv[2], argv[3:]
    path = Path(folder) / argv[1]
    return str(path).removeprefix(f"{CODE}/").removesuffix(".py").replace("/", "."), argv[2:]


@functools.lru_cache(maxsize=1)
def runs(world: World) -> list[Run]:
    """Everything of ours that runs, the entrypoints of RayJobs, on the head, among it."""
    found = []
    for pod in world.pods:
        for container in containers(pod):
            for argv in commands(container):
                found.append((pod, container, program(argv, container.get("workingDir", CODE))))
    for tree in world.of_kind("RayJob"):
        ((head, *_), *_) = world.made_by(tree)
        argv = shlex.split(tree["spec"]["entrypoint"])
        found.append((head, head["spec"]["containers"][0], program(argv, "/tmp")))  # Ray runs it somewhere else
    return [_run(world, pod, container, *ours) for pod, container, ours in found if ours]


def _run(world: World, pod: Object, container: Object, module: str, arguments: list[str]) -> Run:
    args, config = argparse.Namespace(), None
    try:
        args = parse(module, tuple(arguments))
        config = _config(world, pod, container, module, args) if "config" in args else None
    except (ValueError, WarmDistError) as error:
        problem = re.sub(r"/\S*/(?=[^/\s]+\.json)", "", str(error))
        return Run(pod, container, module, args, None, f"{owner(pod)}: {container['name']}: {module}: {problem}")
    return Run(pod, container, module, args, config, "")


@functools.cache
def parse(module: str, arguments: tuple[str, ...]) -> argparse.Namespace:
    """A program's arguments by its own parser. Raises ValueError with what the parser says."""
    if module not in PROGRAMS:
        raise ValueError(f"is not one of {', '.join(PROGRAMS)}")
    loaded, real, said = importlib.import_module(module), argparse.ArgumentParser.parse_args, io.StringIO()
    loads = next((name for name in ("load_config", "load_sweep") if hasattr(loaded, name)), "")
    words = [module, *arguments] + ["--driver"] * (
        loads == "load_sweep"
    )  # without which it starts itself again, with it
    seen: list[argparse.Namespace] = []

    def record(self: argparse.ArgumentParser, *args: Any) -> argparse.Namespace:
        seen.append(real(self, *args))
        return seen[-1]

    parsing = mock.patch.object(argparse.ArgumentParser, "parse_args", record)
    with mock.patch.object(sys, "argv", words), parsing, contextlib.redirect_stderr(said):
        try:
            if not loads:
                return loaded.parse()
            with mock.patch.object(loaded, loads, side_effect=_Parsed):
                loaded.main()
        except _Parsed:  # what comes after argparse may refuse more than it does
            return seen[-1]
        except SystemExit:
            pass
    raise ValueError(said.getvalue().strip().splitlines()[-1])


def _config(world: World, pod: Object, container: Object, module: str, args: argparse.Namespace) -> Any:
    """Of the ConfigMap that is mounted where --config is, with all --set. Raises ValueError or WarmDistError."""
    path = Path(args.config)
    volumes = {volume["name"]: volume.get("configMap") for volume in pod["spec"].get("volumes", [])}
    for mount in container.get("volumeMounts", []):
        if volumes.get(mount["name"]) and mount["mountPath"] == str(path.parent):
            found = world.find("ConfigMap", volumes[mount["name"]]["name"], space_of(pod))
            if found and path.name in found["data"]:
                return _load(module, path.name, tuple(found["data"].items()), tuple(args.set))
    raise ValueError(f"no ConfigMap is mounted as {path}")


@functools.cache
def _load(module: str, name: str, files: tuple[tuple[str, str], ...], overrides: tuple[str, ...]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for file, text in files:
            (Path(folder) / file).write_text(text.replace(f"{CODE}/", f"{ROOT}/"))
        if module != "launch.sweep":
            return load_config(Path(folder) / name, list(overrides))
        sweep = load_sweep(Path(folder) / name, list(overrides))
        trials(*sweep)
        return sweep


@check
def programs(world: World) -> Iterator[str]:
    """Every container of our image runs something, Ray's what KubeRay says; every program is in the image and takes its arguments,
    its config, which a ConfigMap puts there, and all --set."""
    for label, container, _ in world.containers():
        if "/warm-dist:" in container.get("image", "") and not label.startswith("RayJob/") and not commands(container):
            yield f"{label} runs nothing: the image has no entrypoint"
    yield from (run.problem for run in runs(world) if run.problem)
