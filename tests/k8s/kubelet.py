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

from tests.k8s.expand import substitute
from tests.k8s.objects import quantity
from tests.k8s.render import Object
from tests.multinode.nodes import Cluster
from tests.support.processes import ROOT

CODE = ("warm_dist", "data_pipelines", "launch", "configs")
SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64")
DEVICES = ("null", "zero", "full", "random", "urandom")
Texts = Mapping[str, Mapping[str, str]]  # name → key → value
FILES = ("passwd", "group", "nsswitch.conf", "ld.so.cache")  # of /etc; no name for the uid among them
ENDS_WITH_STARTER = "--pdeathsig=KILL"  # unshare asks the kernel for it too, which forgets that at the change of uid
NO_CAPABILITIES = ("--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs", "--clear-groups")


def image_environment() -> dict[str, str]:
    """What the Containerfile's ENV sets."""
    text = (ROOT / "k8s" / "image" / "Containerfile").read_text().replace("\\\n", " ")
    words = [word for line in re.findall(r"^ENV (.*)$", text, re.M) for word in shlex.split(line)]
    return dict(word.split("=", 1) for word in words)


def environment(container: Object, config_maps: Texts, secrets: Texts) -> dict[str, str]:
    """A container's whole environment: the image's, envFrom, env."""
    env, known = image_environment(), {"configMap": config_maps, "secret": secrets}
    for source in container.get("envFrom", []):
        ((kind, reference),) = source.items()
        texts = known[kind.removesuffix("Ref")]
        if reference["name"] in texts or not reference.get("optional"):
            env |= texts[reference["name"]]
    for item in container.get("env", []):
        ((kind, one),) = item.get("valueFrom", {"": None}).items()
        env[item["name"]] = known[kind.removesuffix("KeyRef")][one["name"]][one["key"]] if one else item["value"]
    return env


class Container:
    """A running container. `process` is what started it; its own first process is that one's child."""

    def __init__(
        self, process: subprocess.Popen[bytes], log: Path, inside: list[str], pod: Object, container: Object
    ) -> None:
        self.process, self.log, self._inside = process, log, inside
        self._hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        self._grace_s = pod["spec"].get("terminationGracePeriodSeconds", 30)

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
        enter = ["nsenter", f"--target={first}", "--net", "--mount", "--pid", "--uts", "--ipc", "--root", "--wd=/"]
        hook = subprocess.Popen(
            [*enter, *self._inside, *self._hook], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
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
        self, cluster: Cluster, folder: Path, objects: list[Object], secrets: Texts, hosts: dict[str, str]
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
        script = "\n".join([*self._mounts(pod, container, place), f'exec chroot {place / "root"} "$@"'])
        env = environment(container, self.config_maps, self.secrets)
        words = [substitute(word, env) for word in [*container.get("command", []), *container.get("args", [])]]
        inside = self._inside(pod, container, env)
        enter = ["ip", "netns", "exec", f"{self.cluster.tag}{node}"]
        own = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "sh", "-ec", script, "sh"]
        log = place / f"{container['name']}.log"
        with log.open("wb") as file:
            given = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "env": {"PATH": os.environ["PATH"]}}
            process = subprocess.Popen([*enter, *own, *inside, *words], **given)
        self._running.append(Container(process, log, inside, pod, container))
        return self._running[-1]

    def volume(self, pod: Object, name: str, attempt: int = 0) -> Path:
        """Where a disk volume of a pod lies."""
        return self.folder / f"{pod['metadata']['name']}-{attempt}" / "volumes" / name

    def _inside(self, pod: Object, container: Object, env: dict[str, str]) -> list[str]:
        """What precedes a command in the pod's root: identity, environment, working folder."""
        user = {**pod["spec"]["securityContext"], **container["securityContext"]}
        assert user["readOnlyRootFilesystem"]
        assert user["capabilities"] == {"drop": ["ALL"]}
        who = [f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}", ENDS_WITH_STARTER, *NO_CAPABILITIES]
        given = [f"{name}={value}" for name, value in env.items()]
        return ["setpriv", *who, "env", "-i", "-C", "/opt/warm-dist", *given]

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
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in container["volumeMounts"]:
            target = f"{root}{mount['mountPath']}"
            lines += [f"mkdir -p {target}", self._mount(pod, volumes[mount["name"]], target, place)]
        # after the volumes: on this machine, unlike in the image, all of it may be below /tmp
        if not sys.base_prefix.startswith("/usr/"):
            lines.append(_bind(Path(sys.base_prefix), f"{root}{sys.base_prefix}"))
        # its scripts' first lines name it where it was made
        for path in {"/opt/venv", sys.prefix, os.path.realpath(sys.prefix)}:
            lines.append(_bind(Path(sys.prefix), f"{root}{path}"))
        return [*lines, f"mount -o remount,ro {root}"]

    def _mount(self, pod: Object, volume: Object, target: str, place: Path) -> str:
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            return f"mount -t tmpfs -o mode=1777,size={int(quantity(volume['emptyDir']['sizeLimit']))} shm {target}"
        folder = place / "volumes" / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.config_maps[volume["configMap"]["name"]].items() if "configMap" in volume else ():
            (folder / name).write_text(text)
        os.chown(folder, 0, pod["spec"]["securityContext"]["fsGroup"])
        folder.chmod(0o2777)
        return _bind(folder, target) if "configMap" in volume else f"mount --bind {folder} {target}"


def _bind(source: Path, target: str) -> str:
    return f"mkdir -p {target} && mount --bind {source} {target} && mount -o remount,bind,ro {target}"
