"""What Prometheus is told to read and to warn of is what a run's rank 0 gives."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from unittest import mock

import promql_parser
import torch

from tests.k8s.objects import name_of, port_number
from tests.k8s.references import texts_of
from tests.k8s.trainings import trainings
from tests.k8s.world import World, check
from tests.support.processes import ROOT
from warm_dist.config.run import load_config
from warm_dist.distributed.world import World as Ranks
from warm_dist.training import step_metrics


@functools.cache
def exported() -> set[str]:
    """Every gauge of a run: warm_dist_KIND_NAME of what is written, warm_dist_rank_NAME, and what is followed."""
    text = "\n".join(path.read_text() for folder in ("warm_dist", "launch") for path in (ROOT / folder).rglob("*.py"))
    names = set(re.findall(r'\.follow\(\s*"(\w+)"', text))
    for kind, words in re.findall(r'log\.write\([^,]+, "?(\w+)"?, (.*)\)$', text, re.M):
        kinds = ("upload", "snapshot_upload") if kind == "kind" else (kind,)
        names |= {f"{kind}_{word}" for kind in kinds for word in ("nimg", *re.findall(r"\b(\w+)=", words))}
    config, ranks = load_config(ROOT / "configs" / "quickstart.json"), Ranks(0, 1, torch.device("cpu"), None)
    with mock.patch.object(step_metrics, "flops_per_image", return_value=1.0):  # which builds the network
        line, mine = step_metrics.StepMetrics(config, ranks, print).flush(0, torch.zeros(()))
    names |= {f"train_{name}" for name in line} | {f"rank_{name}" for name in mine[0]}
    return {f"warm_dist_{name}" for name in names}


@check
def rules(world: World) -> Iterator[str]:
    """PromQL parses, every selector is of the namespace where the trainings are, and rules and their texts speak only of gauges that
    a run gives: one on another never fires."""
    for tree in world.of_kind("PrometheusRule"):
        inside = f'namespace="{tree["metadata"].get("namespace")}"'
        for rule in [rule for group in tree["spec"]["groups"] for rule in group["rules"]]:
            label = f"{name_of(tree)}: {rule.get('alert', rule.get('record'))}"
            told = {name for text in texts_of(rule) for name in re.findall(r"\bwarm_dist_\w+", text)}
            yield from (f"{label}: nobody exports {name}" for name in sorted(told - exported()))
            try:
                promql_parser.parse(rule["expr"])
            except ValueError as error:
                yield f"{label}: {error}"
            selectors = re.findall(r"\b(?:warm_dist_\w+|up)\b(\{[^}]*\})?", rule["expr"])
            if any(inside not in selector for selector in selectors):
                yield f"{label}: a selector without {inside}"


@check
def endpoints(world: World) -> Iterator[str]:
    """A PodMonitor reads a training's first pod alone, where rank 0 is, at the port and on an address where it serves."""
    for tree in world.of_kind("PodMonitor"):
        (endpoint,), chosen = tree["spec"]["podMetricsEndpoints"], world.selected(tree, tree["spec"]["selector"])
        for name, nodes, _, config in trainings(world):
            if [run.pod for run in nodes if run.pod in chosen] != [nodes[0].pod]:
                yield f"{name_of(tree)}: reads other pods of {name} than the first alone"
            served = (config.tracking.prometheus_host, config.tracking.prometheus_port) if config else None
            if config and served != ("0.0.0.0", port := port_number(nodes[0].pod, endpoint.get("port"))):
                yield f"{name_of(tree)}: reads port {port}, {name} serves at {served}"
