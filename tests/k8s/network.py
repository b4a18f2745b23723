"""NetworkPolicies, evaluated as a cluster's network plugin would: both ends must allow a flow."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from tests.k8s.objects import component, labels, owner, port_number, selects, space_of
from tests.k8s.render import Object
from tests.k8s.world import World, check


class End(NamedTuple):
    """One end of a flow: a pod of ours (pod), another's pod (labels in a namespace), or an address outside (no namespace)."""

    name: str
    space: str = ""
    labels: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)
    pod: Object | None = None
    address: str = "10.0.0.7"


OTHERS = {
    "dns": End("DNS", "kube-system", {"k8s-app": "kube-dns"}),
    "prometheus": End("Prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"}),
    "kuberay": End("KubeRay", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}),
    "stranger": End("a pod of the namespace default", "default"),
    "outside": End("S3", address="52.216.1.1"),
    "node": End("the node's metadata service", address="169.254.169.254"),
}
EVERYBODY = "trainer ray packer mlflow mlflow-database postgres"
ALLOWED = [
    (EVERYBODY, "dns", "53/UDP 53"),
    ("trainer ray packer mlflow", "outside", "443"),
    ("trainer ray packer mlflow", "s3", "8333"),  # of overlays/dev
    ("trainer ray", "mlflow", "5000"),
    ("trainer", "trainer", "29500 40000"),
    ("ray", "ray", "6379 8265 40000"),
    ("kuberay", "ray", "8265"),
    ("mlflow mlflow-database", "postgres", "5432"),
]
MONITORED = ("prometheus", "trainer", "9400")
FORBIDDEN = [
    (EVERYBODY, "node", "80"),
    ("trainer ray packer stranger", "postgres", "5432"),
    ("packer stranger", "mlflow", "5000"),
    ("packer mlflow stranger", "trainer", "29500"),
    ("stranger", "trainer", "9400"),
    ("stranger", "ray", "8265 6379"),
    ("stranger", "s3", "8333"),
    ("postgres", "outside", "443"),
    ("trainer", "outside", "22"),
]


def _peer(peer: Object, policy: Object, end: End) -> bool:
    if "ipBlock" in peer:
        inside = [
            ip_address(end.address) in ip_network(block)
            for block in [peer["ipBlock"]["cidr"], *peer["ipBlock"].get("except", [])]
        ]
        return inside[0] and not any(inside[1:])
    space = {"kubernetes.io/metadata.name": end.space}
    near = selects(peer["namespaceSelector"], space) if "namespaceSelector" in peer else end.space == space_of(policy)
    return bool(end.space) and near and selects(peer.get("podSelector", {}), end.labels)


def _port(item: Object, port: int, protocol: str, target: End) -> bool:
    wanted = item.get("port", port)
    wanted = target.pod and port_number(target.pod, wanted) if isinstance(wanted, str) else wanted
    return item.get("protocol", "TCP") == protocol and wanted == port


def _passes(policies: list[Object], source: End, target: End, way: str, port: int, protocol: str) -> bool:
    """One end's verdict. way: "egress" or "ingress". Without a policy that selects it, a pod is open; others' ends are not ours to say."""
    mine, other, key = (source, target, "to") if way == "egress" else (target, source, "from")
    closed = False
    for policy in policies if mine.pod else []:
        spec = policy["spec"]
        types = spec.get("policyTypes", ["Ingress", *(["Egress"] if "egress" in spec else [])])
        if space_of(policy) == mine.space and way.capitalize() in types and selects(spec["podSelector"], mine.labels):
            closed = True
            for rule in spec.get(way, []):
                far = [_peer(peer, policy, other) for peer in rule.get(key, [])] or [True]
                if any(far) and any([_port(item, port, protocol, target) for item in rule.get("ports", [])] or [True]):
                    return True
    return not closed


@check
def default_deny(world: World) -> Iterator[str]:
    """Every namespace with pods has a policy that selects all of them and lets nothing in or out."""
    closed = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    denied = {space_of(tree) for tree in world.of_kind("NetworkPolicy") if tree["spec"] == closed}
    for name in sorted({space_of(pod) for pod in world.pods} - denied):
        yield f"Namespace/{name}: no NetworkPolicy denies everything both ways"


@check
def flows(world: World) -> Iterator[str]:
    """The flows that are used pass, and those that have no use do not."""
    policies, ends = world.of_kind("NetworkPolicy"), {name: [end] for name, end in OTHERS.items()}
    for pod in world.kinds:
        ends.setdefault(component(pod), []).append(End(owner(pod), space_of(pod), labels(pod), pod))
    wanted = [*ALLOWED, *([MONITORED] if world.of_kind("PodMonitor") else [])]
    for right, (sources, targets, ports) in [*((True, one) for one in wanted), *((False, one) for one in FORBIDDEN)]:
        for source in [end for name in sources.split() for end in ends.get(name, [])]:
            for target, text in [(end, text) for end in ends.get(targets, []) for text in ports.split()]:
                port, _, protocol = text.partition("/")
                given = policies, source, target
                if all(_passes(*given, way, int(port), protocol or "TCP") for way in ("egress", "ingress")) != right:
                    yield f"{source.name} {'cannot' if right else 'can'} reach {target.name} at {text}"
