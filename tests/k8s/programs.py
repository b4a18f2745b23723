"""What containers run, read as their kubelet, their shell and our own command lines would read it."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import io
import operator
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.k8s.objects import containers, distinct, find, name_of, of_kind, owner, space_of
from tests.k8s.render import Object
from tests.processes import ROOT
from warm_dist.errors import WarmDistError

CODE = "/opt/warm-dist"  # WORKDIR of k8s/image/Containerfile
PROGRAMS = ("launch.train", "launch.node", "launch.sweep", "data_pipelines.pack")
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


class Run(NamedTuple):
    """One of our programs in a container. pod: whose files and variables it sees; container: its name."""

    pod: Object
    container: Object
    module: str
    arguments: list[str]


class _Parsed(Exception):
    """Carries a command line's namespace out of a main() that would go on to work."""


def variables(container: Object) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container.get("env", []) if "value" in item}


def arithmetic(text: str, env: dict[str, str]) -> int:
    """A shell's $((…)) of whole numbers and variables. Raises ValueError for anything else."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return int(_OPERATIONS[type(node.op)](value(node.left), value(node.right)))
        if isinstance(node, ast.Name):
            return int(env.get(node.id) or 0)
        if isinstance(node, ast.Constant):
            return int(node.value)
        raise ValueError(f"$(({text})) is not understood")

    return value(ast.parse(re.sub(r"\$\{?(\w+)\}?", r"\1", text).replace("/", "//").strip(), mode="eval").body)


def shell(text: str, env: dict[str, str], positional: list[str]) -> list[list[str]]:
    """The simple commands of a script, its variables in place. positional: $0 and the words that "$@" stands for."""
    text = re.sub(r"\$\(\(((?:[^()]|\([^()]*\))*)\)\)", lambda found: str(arithmetic(found[1], env)), text)
    text = text.replace('"$@"', shlex.join(positional[1:])).replace("\\\n", " ").replace("\n", " ; ")
    text = re.sub(
        r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)", lambda found: env.get(found[1] or found[3], found[2] or ""), text
    )
    words: list[list[str]] = [[]]
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    for token in lexer:
        if re.fullmatch(r"[;&|]+", token):
            words.append([])
        else:
            words[-1].append(token)
    return [command for command in words if command]


def commands(container: Object) -> list[list[str]]:
    """The simple commands that a container starts with; none if its image or an operator decides."""
    argv = [*container.get("command", []), *container.get("args", [])]
    if not container.get("command"):
        return []
    if Path(argv[0]).name in ("sh", "bash") and len(argv) > 2 and re.fullmatch(r"-[a-z]*c", argv[1]):
        return shell(argv[2], variables(container), argv[3:])
    return [argv]


def program(argv: list[str]) -> tuple[str, list[str]] | None:
    """(module, arguments) if a command runs python with something of ours."""
    while argv and (argv[0] == "exec" or re.fullmatch(r"\w+=.*", argv[0])):
        argv = argv[1:]
    if not argv or not re.fullmatch(r"python3?(\.\d+)?", Path(argv[0]).name):
        return None
    argv = [word for number, word in enumerate(argv[1:]) if not (number == 0 and word == "-u")]
    if argv[:1] == ["-m"]:
        return argv[1], argv[2:]
    if argv and argv[0].endswith(".py"):
        return argv[0].removeprefix(f"{CODE}/").removesuffix(".py").replace("/", "."), argv[1:]
    return None


def runs(objects: list[Object], pods: list[Object]) -> Iterator[Run]:
    """Everything of ours that runs, the entrypoints of RayJobs, on the head, among it."""
    for pod in pods:
        for container in containers(pod):
            for argv in commands(container):
                found = program(argv)
                if found:
                    yield Run(pod, container, *found)
    for tree in of_kind(objects, "RayJob"):
        heads = [
            pod
            for pod in pods
            if owner(pod) == name_of(tree) and pod["metadata"]["labels"].get("ray.io/node-type") == "head"
        ]
        for pod in heads:
            container = pod["spec"]["containers"][0]
            for argv in shell(tree["spec"].get("entrypoint", ""), variables(container), []):
                found = program(argv)
                if found:
                    yield Run(pod, container, *found)


def parse(module: str, arguments: list[str]) -> argparse.Namespace:
    """A program's arguments by its own parser. Raises ValueError with what the parser says."""
    return argparse.Namespace(**_parse(module, tuple(arguments)))


@functools.cache
def _parse(module: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    if module not in PROGRAMS:
        raise ValueError(f"{module} is not one of {', '.join(PROGRAMS)}")
    loaded = importlib.import_module(module)
    real = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> argparse.Namespace:
        raise _Parsed(real(self, *args, **kwargs))

    said = io.StringIO()
    with mock.patch.object(sys, "argv", [module, *arguments]), contextlib.redirect_stderr(said):
        try:
            if module in ("launch.train", "launch.node"):  # whose parse() refuses more than argparse does
                return vars(loaded.parse())
            with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
                loaded.main()
        except _Parsed as found:
            return vars(found.args[0])
        except SystemExit:
            raise ValueError(said.getvalue().strip().splitlines()[-1]) from None
    raise ValueError(f"{module} has read no arguments")


def arguments_parse(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every command line of ours is one that the program takes."""
    messages = []
    for run in runs(objects, distinct(pods)):
        try:
            parse(run.module, run.arguments)
        except ValueError as error:
            messages.append(f"{owner(run.pod)}: {run.container['name']}: {run.module}: {error}")
    return messages


def mounted(objects: list[Object], run: Run, path: str) -> dict[str, str] | None:
    """The texts of the ConfigMap that a container has at the folder of `path`, by file name; None if there is none.

    One that is mounted by items or subPath counts as none: nobody does that here.
    """
    volumes = {volume["name"]: volume for volume in run.pod["spec"].get("volumes", [])}
    for mount in run.container.get("volumeMounts", []):
        source = volumes.get(mount["name"], {}).get("configMap")
        if not source:
            continue
        found = find(objects, "ConfigMap", source["name"], space_of(run.pod))
        data: dict[str, str] = (found or {}).get("data", {})
        if mount["mountPath"].rstrip("/") == str(Path(path).parent) and "subPath" not in mount:
            return data
    return None


@contextlib.contextmanager
def files(objects: list[Object], run: Run, path: str) -> Iterator[Path]:
    """A config as the container sees it, with the files beside it. Raises ValueError if no ConfigMap puts it there."""
    data = mounted(objects, run, path)
    if data is None or Path(path).name not in data:
        raise ValueError(f"no ConfigMap is mounted as {path}")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in data.items():
            (Path(folder) / name).write_text(text.replace(f"{CODE}/", f"{ROOT}/"))
        yield Path(folder) / Path(path).name


def _load(objects: list[Object], run: Run, args: argparse.Namespace) -> None:
    from warm_dist.config.batch import check_world_size
    from warm_dist.config.run import load_config
    from warm_dist.config.sweep import load_sweep
    from warm_dist.sweeps.trials import trials

    with files(objects, run, args.config) as path:
        if run.module == "launch.sweep":
            trials(*load_sweep(path, args.set))
        else:
            config = load_config(path, args.set)
            if run.module == "launch.train":  # validate: just what it does
                check_world_size(config, args.world_size or int(variables(run.container).get("WORLD_SIZE", "1")))


def configs_load(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every --config is a ConfigMap's, and the program takes it with all --set; a validating container accepts it."""
    messages = []
    for run in runs(objects, distinct(pods)):
        with contextlib.suppress(ValueError):  # arguments_parse tells
            args = parse(run.module, run.arguments)
            if "config" in args:
                messages += [
                    f"{owner(run.pod)}: {run.container['name']}: {text}" for text in _problem(objects, run, args)
                ]
    return messages


def _problem(objects: list[Object], run: Run, args: argparse.Namespace) -> Iterator[str]:
    try:
        _load(objects, run, args)
    except (ValueError, WarmDistError) as error:
        yield re.sub(r"/\S*/(?=[^/\s]+\.json)", "", str(error))


def where(objects: list[Object], pods: list[Object]) -> list[str]:
    """Relative paths of programs are the image's WORKDIR's; Ray runs an entrypoint elsewhere."""
    messages = []
    for pod in distinct(pods):
        for container in containers(pod):
            relative = [argv for argv in commands(container) if program(argv) and not argv[1].startswith(("/", "-"))]
            if relative and container.get("workingDir", CODE) != CODE:
                messages.append(f"{owner(pod)}: {relative[0][1]} is not in {container['workingDir']}")
    for tree in of_kind(objects, "RayJob"):
        words = shlex.split(tree["spec"].get("entrypoint", ""))
        if len(words) < 2 or not words[1].startswith((f"{CODE}/", "-")):
            messages.append(f"{name_of(tree)}: entrypoint {' '.join(words[:2])!r} needs a path below {CODE}")
    return messages


def config_of(objects: list[Object], run: Run) -> Any:
    """The training config of a run of launch.train or launch.node; None if it cannot be read, which configs_load tells."""
    from warm_dist.config.run import load_config

    try:
        args = parse(run.module, run.arguments)
        with files(objects, run, args.config) as path:
            return load_config(path, args.set)
    except (ValueError, WarmDistError):
        return None


def trial_of(objects: list[Object], run: Run) -> Any:
    """What the sweep of a run of launch.sweep gives each trial; None if it cannot be read, which configs_load tells."""
    from warm_dist.config.sweep import load_sweep

    try:
        args = parse(run.module, run.arguments)
        with files(objects, run, args.config) as path:
            return load_sweep(path, args.set)[0].trial
    except (ValueError, WarmDistError):
        return None
