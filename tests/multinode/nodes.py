"""Machines, as far as training can tell: network namespaces on one bridge, each with its own host name and process ids.

node1, node2, … have 10.77.0.1, 10.77.0.2, … on eth0 and nothing else. The bridge lives in a namespace too, so that
deleting the namespaces removes everything. Files are shared, as on a cluster with a common file system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.processes import ROOT

MASTER, PORT = "10.77.0.1", 29500
_ENTER = 'hostname "$0" && mount --bind {hosts} /etc/hosts && "$@"; exit $?'  # no exec: the shell is the node's pid 1

SSH = """#!/bin/bash
# stands in for ssh: `ssh [options] HOST COMMAND…` enters the node with an empty environment, as a login would
while [[ $1 == -* ]]; do case $1 in -o|-p|-l) shift 2;; *) shift;; esac; done
host=$1; shift
exec env -i PATH="$PATH" {folder}/enter "$host" bash -c "$*"
"""
PDSH = """#!/bin/bash
# stands in for pdsh: -w HOSTS COMMAND…, %n is the node's number; lines get the host's name; -S: the largest exit code
while [[ $1 == -* ]]; do case $1 in -w) hosts=$2; shift 2;; -f) shift 2;; *) shift;; esac; done
number=0; jobs=()
for host in ${hosts//,/ }; do
    ssh "$host" "${*//%n/$number}" > >(sed "s/^/$host: /") 2> >(sed "s/^/$host: /" >&2) &
    jobs+=($!); number=$((number + 1))
done
code=0
for job in "${jobs[@]}"; do wait "$job"; last=$?; ((last > code)) && code=$last; done
exit $code
"""


def missing() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if shutil.which("ip") is None:
        return "NO NETWORK NAMESPACES: no `ip` command (iproute2)"
    name = f"wd{os.getpid()}probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"NO NETWORK NAMESPACES: {done.stderr.strip()} (needs root)"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def need() -> None:
    """A loud skip where there can be no namespaces, in CI a failure."""
    if reason := missing():
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


class Cluster:
    """`with Cluster(3, folder) as cluster:` makes the nodes and, at the end, removes all that was made.

    folder: for the nodes' /etc/hosts and for `bin`, whose stand-ins let DeepSpeed's own runner reach the nodes.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.names = [f"node{number}" for number in range(1, size + 1)]
        self.folder, self.tag = folder, f"wd{os.getpid()}"
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Cluster:
        self._write_files()
        try:
            self._ip("netns", "add", f"{self.tag}hub")
            self._hub("link", "add", "bridge", "type", "bridge")
            self._hub("link", "set", "bridge", "up")
            for number, name in enumerate(self.names, 1):
                space = f"{self.tag}{name}"
                self._ip("netns", "add", space)
                self._hub("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
                self._hub("link", "set", name, "master", "bridge", "up")
                self._ip("-n", space, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    self._ip("-n", space, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()  # the node's first process, and with it all others there
            process.wait()
        for name in ("hub", *self.names):
            with suppress(subprocess.CalledProcessError):
                self._ip("netns", "del", f"{self.tag}{name}")

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Run a command on a node. Killing the process it returns is the end of everything that it started there."""
        process = subprocess.Popen(
            [str(self.folder / "bin" / "enter"), name, *command],
            env=dict(env),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def join(self, node: subprocess.Popen[str], command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        """Run a command among the processes of one that `start` returned, as a second terminal of its node would.

        log: a file that its exit code is added to, as `exit 0`, after what it says. It ends with that node's processes.
        """
        (first,) = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
        enter = ["nsenter", f"--target={first}", "--net", "--mount", "--pid", "--uts", f"--wd={ROOT}"]
        with log.open("w") as file:
            shell = ["sh", "-c", '"$@"; echo "exit $?"', "sh", *command]
            process = subprocess.Popen([*enter, *shell], env=dict(env), stdout=file, stderr=file, text=True)
        self._processes.append(process)

    def link(self, name: str, state: str) -> None:
        """Pull the node's cable ("down") or plug it in again ("up"), at the bridge's end."""
        self._hub("link", "set", name, state)

    def hostfile(self, size: int) -> str:
        """DeepSpeed's list of the first `size` nodes, one process each."""
        path = self.folder / f"hosts{size}"
        path.write_text("".join(f"{name} slots=1\n" for name in self.names[:size]))
        return str(path)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def _hub(self, *words: str) -> None:
        self._ip("-n", f"{self.tag}hub", *words)

    def _write_files(self) -> None:
        tools, hosts = self.folder / "bin", self.folder / "etc_hosts"
        tools.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"10.77.0.{number} {name}" for number, name in enumerate(self.names, 1))]
        hosts.write_text("\n".join(lines) + "\n")
        isolate = "unshare --pid --fork --kill-child --mount-proc --uts"
        script = f"exec ip netns exec {self.tag}$1 {isolate} sh -c '{_ENTER.format(hosts=hosts)}' \"$@\""
        texts = {"enter": f"#!/bin/sh\n{script}\n", "ssh": SSH.replace("{folder}", str(tools))}
        if shutil.which("pdsh") is None:  # the real one would call our ssh
            texts["pdsh"] = PDSH
        for name, text in texts.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
