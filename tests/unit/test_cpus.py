"""CPUs that are ours are fewer than the machine's in a container, under taskset and under SLURM."""

from __future__ import annotations

import os

import pytest

from warm_dist.cpus import usable_cpus

LIMITS = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")


@pytest.fixture(autouse=True)
def sixteen(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(tmp_path):
    """A function that writes the cgroups of a machine: {path below /: text}."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_a_machine_of_our_own(tmp_path):
    assert usable_cpus(tmp_path) == 16


def test_affinity_and_slurm(monkeypatch, tmp_path):
    for name in LIMITS:
        monkeypatch.setenv(name, "5")
        assert usable_cpus(tmp_path) == 5
        for odd in ("", "4(x2)", "0"):
            monkeypatch.setenv(name, odd)
            assert usable_cpus(tmp_path) == (1 if odd == "0" else 16)
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert usable_cpus(tmp_path) == 1


V2 = {"proc/self/cgroup": "0::/pod/box\n"}


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        (V2 | {"sys/fs/cgroup/pod/box/cpu.max": "max 100000\n"}, 16),
        (V2 | {"sys/fs/cgroup/pod/box/cpu.max": "250000 100000\n"}, 3),
        (V2 | {"sys/fs/cgroup/pod/cpu.max": "200000 100000\n", "sys/fs/cgroup/pod/box/cpu.max": "max 100000"}, 2),
        (V2 | {"sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),  # the container's own root
        (V2 | {"sys/fs/cgroup/pod/box/cpu.max": "nonsense"}, 16),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n3:memory:/y\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n", "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000"}, 16),
    ],
)  # fmt: skip
def test_a_quota_of_cgroups_counts(machine, files, cpus):
    assert usable_cpus(machine(files)) == cpus
