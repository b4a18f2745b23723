"""Whatever names something else must find it: ConfigMaps, Secrets, accounts, claims, ports, selectors, addresses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.objects import containers, name_of, owner, port_number, selects, space_of
from tests.k8s.render import K8S, Object
from tests.k8s.world import World, check

_ADDRESS = re.compile(r"\b[a-z][a-z0-9+]*://(?:[^\s/@\"']*@)?([a-z][a-z0-9-]*)(?:\.[a-z0-9-]+\.svc[a-z.]*)?:(\d+)\b")
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


README = (K8S / "README.md").read_text(encoding="utf-8")
SECRETS = re.findall(r"create secret generic (\S+)([^\n]*)", README)
"""(name, the command's rest) of what people are told to make."""


def _used(pod: Object, kind: str) -> Iterator[tuple[str, str, bool]]:
    """(name, key or "", optional) of each ConfigMap or Secret that a pod reads. kind: "configMap" or "secret"."""
    volumes = [volume[kind] for volume in pod["spec"].get("volumes", []) if kind in volume]
    yield from ((one.get("name", one.get("secretName")), "", False) for one in volumes)
    for container in containers(pod):
        sources = [source.get(f"{kind}Ref") for source in container.get("envFrom", [])]
        sources += [item.get("valueFrom", {}).get(f"{kind}KeyRef") for item in container.get("env", [])]
        yield from ((one["name"], one.get("key", ""), one.get("optional", False)) for one in sources if one)


@check
def config_maps(world: World) -> Iterator[str]:
    """Every ConfigMap that a pod reads is among the objects, with the keys that are read."""
    for pod in world.kinds:
        for name, key, optional in _used(pod, "configMap"):
            found = world.find("ConfigMap", name, space_of(pod))
            if (found is None and not optional) or (found and key and key not in found["data"]):
                yield f"{owner(pod)}: no ConfigMap {name} with a key {key!r}"


@check
def secrets(world: World) -> Iterator[str]:
    """Every Secret that a pod reads has its `kubectl create secret` in k8s/README.md, with the keys that are read."""
    known = {name: re.findall(r"--from-literal=([\w.-]+)=", rest) for name, rest in SECRETS}
    for pod in world.kinds:
        for name, key, _ in _used(pod, "secret"):
            if name not in known or (key and key not in known[name]):
                yield f"{owner(pod)}: no command in k8s/README.md makes the Secret {name} with a key {key!r}"
    yield from (f"{name_of(tree)}: a Secret in the repository" for tree in world.of_kind("Secret"))


@check
def accounts(world: World) -> Iterator[str]:
    """Every pod has a service account that exists."""
    for pod in world.kinds:
        name = pod["spec"].get("serviceAccountName", "default")
        if world.find("ServiceAccount", name, space_of(pod)) is None:
            yield f"{owner(pod)}: {pod['metadata']['name']} runs as {name}, which is no ServiceAccount"


@check
def volumes(world: World) -> Iterator[str]:
    """Mounts and volumes belong together, no two mounts are at one place, and every claim comes of its own StatefulSet's template
    or is one that k8s/README.md tells people to make."""
    told = re.findall(r"PersistentVolumeClaim `(.*?)`", README)
    for pod in world.kinds:
        claimed = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod["spec"].get("volumes", [])}
        for name, claim in claimed.items():
            if claim and claim["claimName"] not in [*told, f"{name}-{pod['metadata']['name']}"]:
                yield f"{owner(pod)}: nobody makes the PersistentVolumeClaim {claim['claimName']}"
        every = [container.get("volumeMounts", []) for container in containers(pod)]
        if claimed.keys() != (mounted := {mount["name"] for mounts in every for mount in mounts}):
            yield f"{owner(pod)}: its volumes are {sorted(claimed)}, mounted are {sorted(mounted)}"
        if any(len({mount["mountPath"] for mount in mounts}) < len(mounts) for mounts in every):
            yield f"{owner(pod)}: two mounts at one place"


@check
def selectors(world: World) -> Iterator[str]:
    """What selects pods selects at least one; a Deployment's or StatefulSet's selector is met by its own template."""
    for tree in world.objects:
        for selector in _selectors(tree):
            if not world.selected(tree, selector):
                yield f"{name_of(tree)}: {json.dumps(selector)} selects no pod"
        own = tree["spec"] if tree["kind"] in ("Deployment", "StatefulSet") else None
        if own and not selects(own["selector"], own["template"]["metadata"]["labels"]):
            yield f"{name_of(tree)}: its selector is not met by its template"


def _selectors(tree: Object) -> list[Object]:
    """Those that mean pods of the object's own namespace."""
    spec = tree.get("spec", {})
    if tree["kind"] == "Service":
        return [{"matchLabels": spec["selector"]}]
    if tree["kind"] in ("PodDisruptionBudget", "PodMonitor"):
        return [spec["selector"]]
    if tree["kind"] == "NetworkPolicy":
        rules = [*spec.get("ingress", []), *spec.get("egress", [])]
        peers = [peer for rule in rules for peer in [*rule.get("from", []), *rule.get("to", [])]]
        mine = [peer for peer in peers if "podSelector" in peer and "namespaceSelector" not in peer]
        return [spec["podSelector"], *(peer["podSelector"] for peer in mine)]
    return []


@check
def ports(world: World) -> Iterator[str]:
    """Ports that Services and probes speak of are container ports of the pods they mean."""
    for tree in world.of_kind("Service"):
        for pod in world.selected(tree, {"matchLabels": tree["spec"]["selector"]}):
            for port in [port.get("targetPort", port["port"]) for port in tree["spec"]["ports"]]:
                if port_number(pod, port) is None:
                    yield f"{name_of(tree)}: {owner(pod)} has no port {port}"
    for label, container, _ in world.containers():
        for probe in [container[kind] for kind in _PROBES if kind in container]:
            asked = probe.get("httpGet") or probe.get("tcpSocket") or {}
            own = port_number({"spec": {"containers": [container]}}, asked.get("port"))
            if asked and (own is None or "host" in asked):  # Pod Security's `restricted` refuses another host
                yield f"{label}: it has no {asked} for its probe"


def texts_of(tree: Any) -> Iterator[str]:
    """Every text inside."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from texts_of(value)


@check
def addresses(world: World) -> Iterator[str]:
    """scheme://NAME:PORT in a config, a variable or an argument, and in the README's Secrets, is a Service's name and port."""
    texts = [(name_of(tree), text) for tree in world.of_kind("ConfigMap") for text in texts_of(tree["data"])]
    texts += [(label, text) for label, container, _ in world.containers() for text in texts_of(container)]
    texts += [("k8s/README.md", rest) for _, rest in SECRETS]
    for name, text in texts:
        for host, port in _ADDRESS.findall(text) if "://" in text else []:
            service = world.find("Service", host)
            known = [item["port"] for item in service["spec"]["ports"]] if service else []
            if host != "localhost" and int(port) not in known:
                yield f"{name}: {host}:{port} is no Service's, that has {known}"
