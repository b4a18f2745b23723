"""NetworkPolicies, evaluated as a cluster's network plugin would: both ends must allow a flow."""

from __future__ import annotations

import ipaddress
from typing import Any, NamedTuple

from tests.k8s.objects import component, distinct, name_of, of_kind, owner, port_number, selects, space_of
from tests.k8s.references import used_by
from tests.k8s.render import Object

S3, METADATA = "52.216.1.1", "169.254.169.254"
LABEL = "kubernetes.io/metadata.name"


class End(NamedTuple):
    """One end of a flow: a pod of ours (pod), another's pod (labels in a namespace), or an address outside (ip)."""

    name: str
    space: str = ""
    labels: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)
    pod: Object | None = None
    ip: str = ""


DNS = End("DNS", "kube-system", {"k8s-app": "kube-dns"})
PROMETHEUS = End("Prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"})
KUBERAY = End("KubeRay", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
STRANGER = End("a pod of the namespace default", "default", {})
OUTSIDE, NODE = End("S3", ip=S3), End("the node's metadata service", ip=METADATA)

ALLOWED: list[tuple[str | End, str | End, int]] = [
    ("trainer", "trainer", 29500),
    ("trainer", "trainer", 40000),
    ("trainer", "mlflow", 5000),
    ("trainer", OUTSIDE, 443),
    ("ray", "ray", 6379),
    ("ray", "ray", 8265),
    ("ray", "ray", 40000),
    ("ray", "mlflow", 5000),
    ("ray", OUTSIDE, 443),
    (KUBERAY, "ray", 8265),
    ("packer", OUTSIDE, 443),
    ("mlflow", OUTSIDE, 443),
    ("mlflow", "postgres", 5432),
    *((kind, "s3", 8333) for kind in ("trainer", "ray", "packer", "mlflow")),
]
"""Of components that a world has; overlays/dev alone has an S3 server of its own."""
FORBIDDEN: list[tuple[str | End, str | End, int]] = [
    ("trainer", "postgres", 5432),
    ("ray", "postgres", 5432),
    ("packer", "postgres", 5432),
    ("packer", "mlflow", 5000),
    ("packer", "trainer", 29500),
    ("mlflow", "trainer", 29500),
    ("postgres", OUTSIDE, 443),
    *((kind, NODE, 80) for kind in ("trainer", "ray", "packer", "mlflow", "postgres")),
    ("trainer", OUTSIDE, 22),
    (STRANGER, "trainer", 29500),
    (STRANGER, "trainer", 9400),
    (STRANGER, "ray", 8265),
    (STRANGER, "ray", 6379),
    (STRANGER, "postgres", 5432),
    (STRANGER, "mlflow", 5000),
    (STRANGER, "s3", 8333),
]


def _ends(what: str | End, pods: list[Object]) -> list[End]:
    """The pods of a component, or the end itself."""
    if isinstance(what, End):
        return [what]
    mine = [pod for pod in distinct(pods) if component(pod) == what]
    return [End(owner(pod), space_of(pod), pod["metadata"]["labels"], pod) for pod in mine]


def _peer(peer: Object, policy: Object, end: End, doubt: bool) -> bool:
    """doubt: what to say of an ipBlock and a pod, whose address is not known yet."""
    if "ipBlock" in peer:
        if not end.ip:
            return doubt
        block = peer["ipBlock"]
        address = ipaddress.ip_address(end.ip)
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(one) for one in block.get("except", []))
    if end.ip:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], {LABEL: end.space}):
            return False
    elif end.space != space_of(policy):
        return False
    return selects(peer.get("podSelector", {}), end.labels)


def _port(item: Object, port: int, protocol: str, target: End) -> bool:
    if item.get("protocol", "TCP") != protocol:
        return False
    wanted: Any = item.get("port")
    if isinstance(wanted, str):
        return target.pod is not None and port_number(target.pod, wanted) == port
    return wanted is None or wanted <= port <= item.get("endPort", wanted)


def _passes(objects: list[Object], mine: End, other: End, way: str, port: int, protocol: str, doubt: bool) -> bool:
    """One end's verdict. way: "egress" or "ingress". Without a policy that selects it, a pod is open."""
    if mine.pod is None:
        return True  # not ours to say
    rules: list[tuple[Object, Object]] = []
    isolated = False
    for policy in of_kind(objects, "NetworkPolicy"):
        spec = policy["spec"]
        types = spec.get("policyTypes", ["Ingress", *(["Egress"] if "egress" in spec else [])])
        if space_of(policy) == mine.space and way.capitalize() in types and selects(spec["podSelector"], mine.labels):
            isolated = True
            rules += [(policy, rule) for rule in spec.get(way, [])]
    target = other if way == "egress" else mine
    key = "to" if way == "egress" else "from"
    for policy, rule in rules:
        peers, wanted = rule.get(key, []), rule.get("ports", [])
        if (not peers or any(_peer(peer, policy, other, doubt) for peer in peers)) and (
            not wanted or any(_port(item, port, protocol, target) for item in wanted)
        ):
            return True
    return not isolated


def passes(
    objects: list[Object], source: End, target: End, port: int, protocol: str = "TCP", doubt: bool = False
) -> bool:
    """Whether a connection comes about."""
    return _passes(objects, source, target, "egress", port, protocol, doubt) and _passes(
        objects, target, source, "ingress", port, protocol, doubt
    )


def default_deny(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every namespace with pods has a policy that selects all of them and lets nothing in or out."""
    messages = []
    for name in sorted({space_of(pod) for pod in pods}):
        mine = [tree["spec"] for tree in of_kind(objects, "NetworkPolicy") if space_of(tree) == name]
        closed = [
            spec for spec in mine if spec["podSelector"] == {} and not spec.get("ingress") and not spec.get("egress")
        ]
        if not any(set(spec.get("policyTypes", [])) == {"Ingress", "Egress"} for spec in closed):
            messages.append(f"Namespace/{name}: no NetworkPolicy denies everything both ways")
    return messages


def dns(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every pod may ask DNS, by UDP and TCP."""
    messages = []
    for pod in distinct(pods):
        end = End(owner(pod), space_of(pod), pod["metadata"]["labels"], pod)
        lacking = [kind for kind in ("UDP", "TCP") if not passes(objects, end, DNS, 53, kind)]
        messages += [f"{owner(pod)}: {pod['metadata']['name']} may not ask DNS by {kind}" for kind in lacking]
    return messages


def flows(objects: list[Object], pods: list[Object]) -> list[str]:
    """The flows that are used pass, and those that have no use do not. Who reads the database's password may reach it."""
    messages = []
    wanted: list[tuple[str | End, str | End, int]] = list(ALLOWED)
    if of_kind(objects, "PodMonitor"):
        wanted.append((PROMETHEUS, "trainer", 9400))
    for pod in distinct(pods):
        if any(name == "mlflow-database" for name, _, _ in used_by(pod, "secret")) and component(pod) != "postgres":
            wanted.append((End(owner(pod), space_of(pod), pod["metadata"]["labels"], pod), "postgres", 5432))
    for pairs, right in ((wanted, True), (FORBIDDEN, False)):
        for sources, targets, port in pairs:
            for source in _ends(sources, pods):
                for target in _ends(targets, pods):
                    if passes(objects, source, target, port, doubt=not right) != right:
                        messages.append(f"{source.name} {'cannot' if right else 'can'} reach {target.name} at {port}")
    return sorted(set(messages))


def selected(objects: list[Object], pods: list[Object]) -> list[str]:
    """A policy of no types does nothing, and one without its direction's type has rules that nobody reads."""
    messages = []
    for tree in of_kind(objects, "NetworkPolicy"):
        types = tree["spec"].get("policyTypes", [])
        unread = [way for way in ("ingress", "egress") if tree["spec"].get(way) and way.capitalize() not in types]
        messages += [f"{name_of(tree)}: {way} rules, but policyTypes {types}" for way in unread]
    return messages
