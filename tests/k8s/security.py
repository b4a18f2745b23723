"""Pod Security's `restricted` profile, and what we ask beyond it.

Source: kubernetes.io/docs/concepts/security/pod-security-standards and the checks of k8s.io/pod-security-admission, v1.37.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.k8s.objects import containers, distinct, find, name_of, of_kind, owner, space_of
from tests.k8s.render import Object

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
}
LEVEL = "pod-security.kubernetes.io/enforce"


def restricted(objects: list[Object], pods: list[Object]) -> list[str]:
    """What the admission of a namespace with enforce: restricted would refuse."""
    messages = []
    for pod in distinct(pods):
        spec = pod["spec"]
        messages += [f"{owner(pod)}: {text}" for text in _of_pod(spec)]
        for container in containers(pod):
            messages += [f"{owner(pod)}: {container['name']}: {text}" for text in _of_container(container, spec)]
    return messages


def _of_pod(spec: Object) -> Iterator[str]:
    context = spec.get("securityContext", {})
    yield from (f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))
    for volume in spec.get("volumes", []):
        kinds = volume.keys() - {"name"}
        yield from (f"volume {volume['name']} is of kind {kind}" for kind in sorted(kinds - VOLUMES))
    yield from (f"sysctl {item['name']}" for item in context.get("sysctls", []) if item["name"] not in SYSCTLS)
    if context.get("runAsUser") == 0:
        yield "runAsUser is 0"
    yield from _of_context(context)


def _of_context(context: Object) -> Iterator[str]:
    """What pods and containers have in common."""
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type", "") not in SELINUX or selinux.get("user") or selinux.get("role"):
        yield f"seLinuxOptions {selinux}"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield "hostProcess"
    for key in ("seccompProfile", "appArmorProfile"):
        kind = context.get(key, {}).get("type", "RuntimeDefault")
        if kind not in ("RuntimeDefault", "Localhost"):
            yield f"{key} is {kind}"


def _of_container(container: Object, spec: Object) -> Iterator[str]:
    context, outer = container.get("securityContext", {}), spec.get("securityContext", {})
    capabilities = context.get("capabilities", {})
    yield from _of_context(context)
    if context.get("privileged"):
        yield "is privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if "ALL" not in capabilities.get("drop", []):
        yield "does not drop ALL capabilities"
    yield from (f"adds the capability {name}" for name in capabilities.get("add", []) if name != "NET_BIND_SERVICE")
    if context.get("runAsNonRoot", outer.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if context.get("runAsUser") == 0:
        yield "runAsUser is 0"
    if "seccompProfile" not in context and "seccompProfile" not in outer:
        yield "has no seccompProfile"
    if context.get("procMount", "Default") != "Default":
        yield f"procMount is {context['procMount']}"
    yield from (f"hostPort {port['hostPort']}" for port in container.get("ports", []) if port.get("hostPort"))
    for place in ("livenessProbe", "readinessProbe", "startupProbe"):
        probe = container.get(place, {})
        if probe.get("httpGet", {}).get("host") or probe.get("tcpSocket", {}).get("host"):
            yield f"{place} names a host"


def hardened(objects: list[Object], pods: list[Object]) -> list[str]:
    """A uid of our own, whose number is said (kubelets cannot check a user's name), and a root file system that is read only."""
    messages = []
    for pod in distinct(pods):
        outer = pod["spec"].get("securityContext", {})
        for container in containers(pod):
            context, name = container.get("securityContext", {}), f"{owner(pod)}: {container['name']}"
            if context.get("readOnlyRootFilesystem") is not True:
                messages.append(f"{name}: readOnlyRootFilesystem is not true")
            if not context.get("runAsUser", outer.get("runAsUser")):
                messages.append(f"{name}: runAsUser is not said")
    return messages


def tokens(objects: list[Object], pods: list[Object]) -> list[str]:
    """No pod has a token for Kubernetes, and no account gives one. (A projected token for another audience is another thing.)"""
    messages = [
        f"{owner(pod)}: automountServiceAccountToken is not false"
        for pod in distinct(pods)
        if pod["spec"].get("automountServiceAccountToken") is not False
    ]
    return messages + [
        f"{name_of(tree)}: automountServiceAccountToken is not false"
        for tree in of_kind(objects, "ServiceAccount")
        if tree.get("automountServiceAccountToken") is not False
    ]


def images(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every image has a tag that stays, or a digest."""
    messages = []
    for pod in distinct(pods):
        for container in containers(pod):
            image = container.get("image", "")
            found = re.fullmatch(r"[a-z0-9][^:@\s]*(?::\d+/[^:@\s]+)?(?::([\w][\w.-]*))?(@sha256:[0-9a-f]{64})?", image)
            if not found or not (found[1] or found[2]) or (found[1] == "latest" and not found[2]):
                messages.append(f"{owner(pod)}: {container['name']}: the image {image!r} has no tag that stays")
    return messages


def resources(objects: list[Object], pods: list[Object]) -> list[str]:
    """Requests of cpu and memory, and a limit of memory that is not below what is requested (a limit of cpu only throttles)."""
    messages = []
    for pod in distinct(pods):
        for container in containers(pod):
            given = container.get("resources", {})
            lacking = [f"requests.{key}" for key in ("cpu", "memory") if key not in given.get("requests", {})]
            lacking += ["limits.memory"] if "memory" not in given.get("limits", {}) else []
            if lacking:
                messages.append(f"{owner(pod)}: {container['name']}: has no {', '.join(lacking)}")
    return messages


def namespaces(objects: list[Object], pods: list[Object]) -> list[str]:
    """Every namespace with pods is among the objects and enforces `restricted`."""
    messages = []
    for name in sorted({space_of(pod) for pod in pods}):
        space = find(objects, "Namespace", name)
        if space is None:
            messages.append(f"Namespace/{name}: is not among the objects")
        elif space["metadata"].get("labels", {}).get(LEVEL) != "restricted":
            messages.append(f"Namespace/{name}: {LEVEL} is not restricted")
    return messages
