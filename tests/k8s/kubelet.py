"""Pods, as far as their programs can tell: their own network namespace, process ids, host name and root, as a kubelet gives them.

A container sees the image's layout (the code in /opt/warm-dist, the environment in /opt/venv), read-only, with its volumes
mounted, its environment and no other, its uid, no capability. It is the first process of its process ids.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.k8s.objects import quantity
from tests.k8s.render import Object
from tests.multinode.nodes import Cluster
from tests.processes import ROOT

CODE = ("warm_dist", "data_pipelines", "launch", "configs")
SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64")
DEVICES = ("null", "zero", "full", "random", "urandom")
FILES = ("passwd", "group", "nsswitch.conf", "ld.so.cache")  # of /etc; no name for the uid among them
ENDS_WITH_STARTER = "--pdeathsig=KILL"  # unshare asks the kernel for it too, which forgets that at the change of uid
NO_CAPABILITIES = ("--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs", "--clear-groups")


def image_environment() -> dict[str, str]:
    """What the Containerfile's ENV sets."""
    text = (ROOT / "k8s" / "image" / "Containerfile").read_text().replace("\\\n", " ")
    words = [word for line in re.findall(r"^ENV (.*)$", text, re.M) for word in shlex.split(line)]
    return dict(word.split("=", 1) for word in words)


class Container:
    """A running container. `process` is what started it; its own first process is that one's child."""

    def __init__(
        self, process: subprocess.Popen[bytes], log: Path, inside: list[str], grace_s: float, hook: list[str] | None
    ) -> None:
        self.process, self.log, self._inside, self._grace_s, self._hook = process, log, inside, grace_s, hook

    def wait(self, timeout_s: float) -> int:
        """Its exit code, 128 + n after signal n."""
        code = self.process.wait(timeout_s)
        return code if code >= 0 else 128 - code

    def said(self) -> str:
        """stdout and stderr."""
        return self.log.read_text(errors="replace")

    def until(self, text: str, timeout_s: float = 90) -> None:
        """Wait until it has said so; its end before that, or silence, is a failure that quotes it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def first(self) -> int:
        """The pid of its process 1, as we see it."""
        (pid,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(pid)

    def terminate(self) -> None:
        """SIGTERM to its first process, and no hook before it."""
        os.kill(self.first(), signal.SIGTERM)

    def drain(self) -> tuple[int, float]:
        """Stop it as a kubelet does: the preStop hook, SIGTERM when that has ended, SIGKILL after the grace period.

        Returns its exit code and how long that took.
        """
        began = time.monotonic()
        first, deadline = self.first(), began + self._grace_s
        if self._hook:
            enter = ["nsenter", f"--target={first}", "--net", "--mount", "--pid", "--uts", "--ipc", "--root", "--wd=/"]
            hook = subprocess.Popen(
                [*enter, *self._inside, *self._hook], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            while hook.poll() is None and self.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if hook.poll() is None:  # a container's end is the end of all that was executed in it
                hook.kill()
        if self.process.poll() is None:
            self.terminate()
            try:
                self.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.kill(first, signal.SIGKILL)
        return self.wait(10), time.monotonic() - began


class Kubelet:
    """`with Kubelet(cluster, folder, objects, secrets) as kubelet:` runs containers of expanded pods and ends them all.

    objects: where ConfigMaps come from. secrets: name → key → value. hosts: what the cluster's DNS answers, name → address.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        objects: list[Object],
        secrets: Mapping[str, Mapping[str, str]],
        hosts: Mapping[str, str],
    ) -> None:
        self.cluster, self.folder, self.secrets = cluster, folder, secrets
        self.config_maps = {tree["metadata"]["name"]: tree["data"] for tree in objects if tree["kind"] == "ConfigMap"}
        self.hosts = "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **hosts}.items())
        self._running: list[Container] = []

    def __enter__(self) -> Kubelet:
        for name in self.cluster.names:  # to nobody; Ray finds its own address by the route that a pod has to the world
            route = ["ip", "-n", f"{self.cluster.tag}{name}", "route", "add", "default", "via", "10.77.0.254"]
            subprocess.run(route, check=True)
        return self

    def __exit__(self, *exception: object) -> None:
        for container in self._running:
            container.process.kill()  # and with it the container's first process, and all of its process ids
            container.process.wait()

    def start(self, pod: Object, node: str, attempt: int = 0, container: Object | None = None) -> Container:
        """Start a pod's container, the first if none is named, on a node of the cluster. An attempt has volumes of its own."""
        container = container or pod["spec"]["containers"][0]
        place = self.folder / f"{pod['metadata']['name']}-{attempt}"
        (place / "root").mkdir(parents=True, exist_ok=True)
        inside = self._inside(pod, container)
        script = "\n".join([*self._mounts(pod, container, place), f'exec chroot {place / "root"} "$@"'])
        words = [*container.get("command", []), *container.get("args", [])]
        enter = ["ip", "netns", "exec", f"{self.cluster.tag}{node}"]
        own = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "sh", "-ec", script, "sh"]
        log = place / f"{container['name']}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*enter, *own, *inside, *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={"PATH": os.environ["PATH"]},
            )
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        grace_s = pod["spec"].get("terminationGracePeriodSeconds", 30)
        self._running.append(Container(process, log, inside, grace_s, hook))
        return self._running[-1]

    def volume(self, pod: Object, name: str, attempt: int = 0) -> Path:
        """Where a disk volume of a pod lies."""
        return self.folder / f"{pod['metadata']['name']}-{attempt}" / "volumes" / name

    def environment(self, container: Object) -> dict[str, str]:
        """A container's whole environment: the image's, envFrom, env."""
        env = image_environment()
        for source in container.get("envFrom", []):
            kind, reference = next(iter(source.items()))
            known = self.config_maps if kind == "configMapRef" else self.secrets
            if reference["name"] in known or not reference.get("optional"):
                env |= known[reference["name"]]
        for item in container.get("env", []):
            known = {"secretKeyRef": self.secrets, "configMapKeyRef": self.config_maps}
            source = next(iter(item.get("valueFrom", {}).items()), None)
            env[item["name"]] = known[source[0]][source[1]["name"]][source[1]["key"]] if source else item["value"]
        return env

    def _inside(self, pod: Object, container: Object) -> list[str]:
        """What precedes a command in the pod's root: identity, environment, working folder."""
        user = {**pod["spec"]["securityContext"], **container["securityContext"]}
        assert user["readOnlyRootFilesystem"]
        assert user["capabilities"] == {"drop": ["ALL"]}
        who = [
            "setpriv",
            f"--reuid={user['runAsUser']}",
            f"--regid={user['runAsGroup']}",
            ENDS_WITH_STARTER,
            *NO_CAPABILITIES,
        ]
        env = [f"{name}={value}" for name, value in self.environment(container).items()]
        return [*who, "env", "-i", "-C", "/opt/warm-dist", *env]

    def _mounts(self, pod: Object, container: Object, place: Path) -> list[str]:
        """A shell script that makes the container's root, private to its mount namespace."""
        root = place / "root"
        (place / "hosts").write_text(self.hosts)
        spec = pod["spec"]
        lines = [f"hostname {spec.get('hostname', pod['metadata']['name'])}", "mount --make-rprivate /"]
        lines += [
            f"mount -t tmpfs -o mode=755,size=16m root {root}",
            f"mkdir {root}/proc {root}/dev {root}/etc {root}/opt",
        ]
        for name in SYSTEM:
            if Path(f"/{name}").is_symlink():
                lines.append(f"ln -s {os.readlink(f'/{name}')} {root}/{name}")
            elif Path(f"/{name}").is_dir():
                lines.append(_bind(Path(f"/{name}"), f"{root}/{name}"))
        lines += [_bind(ROOT / name, f"{root}/opt/warm-dist/{name}") for name in CODE]
        lines += [f"cp /etc/{name} {root}/etc/ 2> /dev/null || true" for name in FILES]
        lines += [f"cp {place}/hosts {root}/etc/hosts", f"mount -t proc proc {root}/proc"]
        lines += [f"touch {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}" for name in DEVICES]
        lines += [f"ln -s /proc/self/fd {root}/dev/fd", f"mkdir {root}/dev/shm"]
        lines += [f"mount -t tmpfs -o mode=1777,size=64m shm {root}/dev/shm"]
        mounts = {mount["name"]: mount for mount in container.get("volumeMounts", [])}
        for volume in spec.get("volumes", []):
            if volume["name"] in mounts:
                target = f"{root}{mounts[volume['name']]['mountPath']}"
                lines += [f"mkdir -p {target}", self._mount(pod, volume, target, place)]
        # after the volumes: on this machine, unlike in the image, all of it may be below /tmp
        if not sys.base_prefix.startswith("/usr/"):
            lines.append(_bind(Path(sys.base_prefix), f"{root}{sys.base_prefix}"))
        # its scripts' first lines name it where it was made
        for path in {"/opt/venv", sys.prefix, os.path.realpath(sys.prefix)}:
            lines.append(_bind(Path(sys.prefix), f"{root}{path}"))
        return [*lines, f"mount -o remount,ro {root}"]

    def _mount(self, pod: Object, volume: Object, target: str, place: Path) -> str:
        group = pod["spec"]["securityContext"]["fsGroup"]
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            return f"mount -t tmpfs -o mode=1777,size={int(quantity(volume['emptyDir']['sizeLimit']))} shm {target}"
        folder = place / "volumes" / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            for name, text in self.config_maps[volume["configMap"]["name"]].items():
                (folder / name).write_text(text)
            return _bind(folder, target)
        os.chown(folder, 0, group)
        folder.chmod(0o2777)
        return f"mount --bind {folder} {target}"


def _bind(source: Path, target: str) -> str:
    return f"mkdir -p {target} && mount --bind {source} {target} && mount -o remount,bind,ro {target}"
