"""What Prometheus is told to read and to warn of is what a run's rank 0 gives."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

from tests.k8s.objects import name_of, of_kind, owner, port_number, selects
from tests.k8s.programs import config_of, runs
from tests.k8s.references import texts_of
from tests.k8s.render import Object
from tests.processes import ROOT
from warm_dist.training.step_metrics import PLACES, SUMS

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def _calls(path: str, method: str) -> Iterator[ast.Call]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            yield node


def _assigned(path: str, function: str, variable: str) -> set[str]:
    """The keys that a function of a file gives to a dict: those written out, and those made of PLACES and SUMS."""
    keys: set[str] = set()
    for node in ast.walk(_tree(path)):
        if not isinstance(node, ast.FunctionDef) or node.name != function:
            continue
        for step in ast.walk(node):
            targets = step.targets if isinstance(step, ast.Assign) else [getattr(step, "target", None)]
            if not isinstance(step, ast.Assign | ast.AnnAssign | ast.AugAssign) or step.value is None:
                continue
            if variable in [target.id for target in targets if isinstance(target, ast.Name)]:
                inner = list(ast.walk(step.value))
                named = {item.id for item in inner if isinstance(item, ast.Name)}
                keys |= {
                    key.value
                    for item in inner
                    if isinstance(item, ast.Dict)
                    for key in item.keys
                    if isinstance(key, ast.Constant)
                }
                keys |= {f"{place}_s" for place in PLACES} if "PLACES" in named else set()
                keys |= set(SUMS[:-1]) if "SUMS" in named else set()
                keys |= {"step_s"} if "step_s" in {getattr(item, "value", None) for item in inner} else set()
    return keys


@functools.cache
def exported() -> set[str]:
    """Every gauge of a run: warm_dist_KIND_NAME of what the trainer writes, warm_dist_rank_NAME, and what is followed."""
    names = {"warm_dist_train_nimg", "warm_dist_train_slowest_rank", "warm_dist_train_slowest_s"}
    names |= {f"warm_dist_train_{key}" for key in _assigned("warm_dist/training/step_metrics.py", "flush", "line")}
    names |= {f"warm_dist_rank_{key}" for key in _assigned("warm_dist/training/step_metrics.py", "flush", "mine")}
    for call in _calls("warm_dist/training/trainer.py", "write"):
        kinds = [call.args[1].value] if isinstance(call.args[1], ast.Constant) else ["upload", "snapshot_upload"]
        for kind in set(kinds) - {"event"}:  # which has texts, no numbers
            names |= {f"warm_dist_{kind}_{word.arg}" for word in call.keywords if word.arg} | {f"warm_dist_{kind}_nimg"}
    for path in ("launch/train.py", "warm_dist/training/trainer.py", "warm_dist/distributed/heartbeat.py"):
        for call in _calls(path, "follow"):
            if isinstance(call.args[0], ast.Constant):
                names.add(f"warm_dist_{call.args[0].value}")
    return names


def metrics(objects: list[Object], pods: list[Object]) -> list[str]:
    """Rules and their texts speak only of gauges that a run gives: a rule on another never fires."""
    messages = []
    for tree in of_kind(objects, "PrometheusRule"):
        for group in tree["spec"]["groups"]:
            for rule in group["rules"]:
                told = {name for text in texts_of(rule) for name in re.findall(r"\bwarm_dist_\w+", text)}
                name = rule.get("alert", rule.get("record"))
                messages += [f"{name_of(tree)}: {name}: nobody exports {one}" for one in sorted(told - exported())]
    return messages


def endpoints(objects: list[Object], pods: list[Object]) -> list[str]:
    """A PodMonitor's port is where the trainings it selects serve their metrics, on an address that others can reach."""
    messages = []
    for tree in of_kind(objects, "PodMonitor"):
        for run in runs(objects, [pod for pod in pods if selects(tree["spec"]["selector"], pod["metadata"]["labels"])]):
            config = config_of(objects, run) if run.module == "launch.node" else None
            if config is None:
                continue
            tracking = config.tracking
            for endpoint in tree["spec"]["podMetricsEndpoints"]:
                port = port_number(run.pod, endpoint.get("port"))
                if tracking.prometheus_port != port:
                    messages.append(
                        f"{name_of(tree)}: reads port {port}, {owner(run.pod)} has tracking.prometheus_port {tracking.prometheus_port}"
                    )
            if tracking.prometheus_host in LOOPBACK:
                messages.append(
                    f"{name_of(tree)}: {owner(run.pod)} serves on {tracking.prometheus_host} only: tracking.prometheus_host"
                )
    return messages
