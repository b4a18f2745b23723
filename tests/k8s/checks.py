"""All checks of the manifests by name: each takes the objects of a world and the pods that come of them, and gives messages."""

from __future__ import annotations

from collections.abc import Callable

from tests.k8s import (
    failures,
    invariants,
    monitoring,
    network,
    programs,
    queueing,
    references,
    security,
    trainings,
    validity,
)
from tests.k8s.expand import expand
from tests.k8s.render import Object

Check = Callable[[list[Object], list[Object]], list[str]]

NEED_CRDS: list[Check] = [validity.custom_schema, validity.scope]
CHECKS: list[Check] = [
    *NEED_CRDS,
    validity.core_schema,
    validity.expanded,
    references.once,
    references.config_maps,
    references.secrets,
    references.accounts,
    references.claims,
    references.volume_mounts,
    references.selectors,
    references.ports,
    references.addresses,
    queueing.queues,
    queueing.priorities,
    queueing.covered,
    queueing.quota,
    trainings.runtimes,
    trainings.reserved,
    trainings.world_size,
    trainings.gpus,
    trainings.master,
    trainings.time_to_stop,
    trainings.shared_memory,
    trainings.trials_fit,
    trainings.image_command,
    failures.failure_outcomes,
    failures.failure_rules,
    programs.arguments_parse,
    programs.configs_load,
    programs.where,
    security.restricted,
    security.hardened,
    security.tokens,
    security.images,
    security.resources,
    security.namespaces,
    network.default_deny,
    network.dns,
    network.flows,
    network.selected,
    monitoring.metrics,
    monitoring.endpoints,
    invariants.ray_jobs,
    invariants.groups,
    invariants.literal_secrets,
    invariants.lost_nodes,
    invariants.flavors,
    invariants.packing_order,
    invariants.expressions,
    invariants.one_endpoint,
    invariants.budgets,
    invariants.own_credentials,
    invariants.canonical,
]


def findings(objects: list[Object], checks: list[Check] | None = None) -> dict[str, list[str]]:
    """Check → what it has to say of the objects, those without a message left out. For the objects of a whole world."""
    pods = expand(objects)
    found = {check.__name__: check(objects, pods) for check in (CHECKS if checks is None else checks)}
    return {name: messages for name, messages in found.items() if messages}
