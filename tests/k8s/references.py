"""Whatever names something else must find it: ConfigMaps, Secrets, accounts, claims, ports, selectors, addresses."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.objects import containers, distinct, find, name_of, of_kind, owner, port_number, selects, space_of
from tests.k8s.render import K8S, Object

_ADDRESS = re.compile(r"\b[a-z][a-z0-9+]*://(?:[^\s/@\"']*@)?([a-z][a-z0-9-]*)(?:\.[a-z0-9-]+\.svc[a-z.]*)?:(\d+)\b")


@functools.cache
def documented() -> str:
    """k8s/README.md, in which broken lines of commands are joined."""
    path = K8S / "README.md"
    return path.read_text(encoding="utf-8").replace("\\\n", " ") if path.exists() else ""


def documented_secrets() -> dict[str, set[str]]:
    """Secret → its keys, of the README's `kubectl create secret generic NAME --from-literal=KEY=…`."""
    found: dict[str, set[str]] = {}
    for name, rest in re.findall(r"kubectl (?:-n \S+ )?create secret generic (\S+)([^\n]*)", documented()):
        found.setdefault(name, set()).update(re.findall(r"--from-(?:literal|file)[= ]['\"]?([\w.-]+)=", rest))
    return found


def once(objects: list[Object], pods: list[Object]) -> list[str]:
    """No two objects of one kind and name in one namespace: the second would replace the first."""
    keys = [(name_of(tree), space_of(tree)) for tree in objects]
    return [
        f"{name}: stands twice in {space or 'the cluster'}"
        for name, space in sorted({k for k in keys if keys.count(k) > 1})
    ]


def used_by(pod: Object, kind: str) -> Iterator[tuple[str, list[str], bool]]:
    """(name, keys, optional) of each ConfigMap or Secret that a pod reads. kind: "configMap" or "secret"."""
    for volume in pod["spec"].get("volumes", []):
        sources = [volume, *volume.get("projected", {}).get("sources", [])]
        for source in sources:
            if kind in source:
                one = source[kind]
                keys = [item["key"] for item in one.get("items", [])]
                keys += _subpaths(pod, volume["name"]) if source is volume and not keys else []
                yield one.get("name", one.get("secretName", "")), keys, one.get("optional", False)
    for container in containers(pod):
        for item in container.get("envFrom", []):
            if f"{kind}Ref" in item:
                yield item[f"{kind}Ref"]["name"], [], item[f"{kind}Ref"].get("optional", False)
        for item in container.get("env", []):
            if f"{kind}KeyRef" in item.get("valueFrom", {}):
                one = item["valueFrom"][f"{kind}KeyRef"]
                yield one["name"], [one["key"]], one.get("optional", False)


def _subpaths(pod: Object, volume: str) -> list[str]:
    mounts = [mount for container in containers(pod) for mount in container.get("volumeMounts", [])]
    return [mount["subPath"] for mount in mounts if mount["name"] == volume and "subPath" in mount]


def config_maps(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every ConfigMap that a pod reads is among the objects, with the keys that are read."""
    messages = []
    for pod in distinct(pods):
        for name, keys, optional in used_by(pod, "configMap"):
            found = find(objects, "ConfigMap", name, space_of(pod))
            if found is None and not optional:
                messages.append(f"{owner(pod)}: no ConfigMap {name}")
            known = {**found.get("data", {}), **found.get("binaryData", {})} if found else {}
            messages += [
                f"{owner(pod)}: ConfigMap {name} has no key {key}" for key in keys if found and key not in known
            ]
    return messages


def secrets(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every Secret that a pod reads has its `kubectl create secret` in k8s/README.md, with the keys that are read."""
    messages, known = [], documented_secrets()
    for pod in distinct(pods):
        for name, keys, _ in used_by(pod, "secret"):
            if name not in known:
                messages.append(f"{owner(pod)}: no command in k8s/README.md makes the Secret {name}")
            messages += [
                f"{owner(pod)}: the Secret {name} of k8s/README.md has no key {key}"
                for key in keys
                if name in known and key not in known[name]
            ]
    return messages + [f"{name_of(tree)}: a Secret in the repository" for tree in of_kind(objects, "Secret")]


def accounts(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every pod has a service account of its own kind, that exists."""
    messages = []
    for pod in distinct(pods):
        name = pod["spec"].get("serviceAccountName", "default")
        if find(objects, "ServiceAccount", name, space_of(pod)) is None:
            messages.append(
                f"{owner(pod)}: {pod['metadata']['name']} runs as {name}, which is no ServiceAccount of {space_of(pod)}"
            )
    return messages


def claims(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every claim is an object, comes of a StatefulSet's template, or is one that k8s/README.md tells people to make."""
    templated = {
        f"{claim['metadata']['name']}-{tree['metadata']['name']}-{number}"
        for tree in of_kind(objects, "StatefulSet")
        for claim in tree["spec"].get("volumeClaimTemplates", [])
        for number in range(tree["spec"].get("replicas", 1))
    }
    told = [line for line in documented().splitlines() if re.search(r"PersistentVolumeClaim|\bclaim|\bPVC", line)]
    messages = []
    for pod in distinct(pods):
        for volume in pod["spec"].get("volumes", []):
            name = volume.get("persistentVolumeClaim", {}).get("claimName")
            known = (
                name is None or name in templated or any(re.search(rf"\b{re.escape(name)}\b", line) for line in told)
            )
            if not known and find(objects, "PersistentVolumeClaim", name, space_of(pod)) is None:
                messages.append(f"{owner(pod)}: no PersistentVolumeClaim {name}, and k8s/README.md tells of none")
    return messages


def volume_mounts(objects: list[Object], pods: list[Object]) -> list[str]:
    """Mounts and volumes belong together, and no two mounts are at one place."""
    messages = []
    for pod in distinct(pods):
        volumes = [volume["name"] for volume in pod["spec"].get("volumes", [])]
        used = set()
        for container in containers(pod):
            mounts = container.get("volumeMounts", [])
            used |= {mount["name"] for mount in mounts}
            messages += [
                f"{owner(pod)}: {container['name']} mounts {mount['name']}, which is no volume"
                for mount in mounts
                if mount["name"] not in volumes
            ]
            places = [mount["mountPath"] for mount in mounts]
            messages += [
                f"{owner(pod)}: two mounts at {place}" for place in sorted({p for p in places if places.count(p) > 1})
            ]
        messages += [f"{owner(pod)}: nothing mounts the volume {name}" for name in volumes if name not in used]
    return messages


def _of_space(tree: Object, pods: list[Object]) -> list[Object]:
    return [pod for pod in pods if space_of(pod) == space_of(tree)]


def selectors(objects: list[Object], pods: list[Object]) -> list[str]:
    """What selects pods selects at least one; a Deployment's or StatefulSet's selector is met by its own template."""
    messages = []
    for tree in objects:
        spec = tree.get("spec", {})
        if tree["kind"] == "Service":
            wanted = [{"matchLabels": spec["selector"]}] if spec.get("selector") else []
        elif tree["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            wanted = [spec.get("selector", {})]
        elif tree["kind"] == "NetworkPolicy":
            rules = [*spec.get("ingress", []), *spec.get("egress", [])]
            peers = [peer for rule in rules for peer in [*rule.get("from", []), *rule.get("to", [])]]
            wanted = [
                spec["podSelector"],
                *(peer["podSelector"] for peer in peers if "namespaceSelector" not in peer and "podSelector" in peer),
            ]
        else:
            wanted = []
        messages += [
            f"{name_of(tree)}: {json.dumps(selector)} selects no pod"
            for selector in wanted
            if not any(selects(selector, pod["metadata"]["labels"]) for pod in _of_space(tree, pods))
        ]
        if tree["kind"] in ("Deployment", "StatefulSet"):
            labels = spec["template"]["metadata"].get("labels", {})
            messages += (
                []
                if selects(spec["selector"], labels)
                else [f"{name_of(tree)}: its selector is not met by its template"]
            )
    return messages


def ports(objects: list[Object], pods: list[Object]) -> list[str]:
    """Ports that Services, PodMonitors and probes speak of are container ports of the pods they mean."""
    messages = []
    for tree in of_kind(objects, "Service"):
        for pod in _selected(tree, {"matchLabels": tree["spec"].get("selector", {})}, pods):
            for port in tree["spec"].get("ports", []):
                target = port.get("targetPort", port["port"])
                if port_number(pod, target) is None:
                    messages.append(f"{name_of(tree)}: {owner(pod)} has no port {target}")
    for tree in of_kind(objects, "PodMonitor"):
        for endpoint in tree["spec"]["podMetricsEndpoints"]:
            port = endpoint.get("port", endpoint.get("portNumber"))
            chosen = _selected(tree, tree["spec"]["selector"], pods)
            messages += [
                f"{name_of(tree)}: {owner(pod)} has no port {port}" for pod in chosen if port_number(pod, port) is None
            ]
    for pod in distinct(pods):
        for container in containers(pod):
            for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
                port = container.get(kind, {}).get("httpGet", container.get(kind, {}).get("tcpSocket", {})).get("port")
                if port is not None and port_number({"spec": {"containers": [container]}}, port) is None:
                    messages.append(f"{owner(pod)}: {container['name']} has no port {port} for its {kind}")
    return messages


def _selected(tree: Object, selector: Object, pods: list[Object]) -> list[Object]:
    return [pod for pod in distinct(_of_space(tree, pods)) if selects(selector, pod["metadata"]["labels"])]


def texts_of(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from texts_of(value)


def addresses(objects: list[Object], pods: list[Object]) -> list[str]:
    """scheme://NAME:PORT in a config, a variable or an argument, and in the README's Secrets, is a Service's name and port."""
    messages = []
    texts = [(name_of(tree), text) for tree in of_kind(objects, "ConfigMap") for text in texts_of(tree.get("data", {}))]
    for pod in distinct(pods):
        texts += [(owner(pod), text) for container in containers(pod) for text in texts_of(container)]
    texts += [("k8s/README.md", text) for text in re.findall(r"create secret generic [^\n]*", documented())]
    for name, text in texts:
        for host, port in _ADDRESS.findall(text):
            if host == "localhost":
                continue
            service = find(objects, "Service", host)
            known = [item["port"] for item in service["spec"]["ports"]] if service else []
            if int(port) not in known:
                messages.append(
                    f"{name}: {host}:{port} is no Service's port" + (f", it has {known}" if service else "")
                )
    return sorted(set(messages))
