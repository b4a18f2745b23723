"""How many of the machine's CPUs are this process's to use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SLURM = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")


def usable_cpus(root: Path = Path("/")) -> int:
    """The fewest that affinity (taskset, cpuset), the cgroups' quota (containers) and SLURM allow; at least 1 (Linux).

    root: of the file system with /proc and /sys.
    """
    limits = [len(os.sched_getaffinity(0)), *_quotas(root)]
    limits += [int(text) for text in map(os.environ.get, _SLURM) if text and text.isdecimal()]
    return max(1, min(limits))


def _quotas(root: Path) -> Iterator[int]:
    """CPUs that this process's cgroups, version 1 or 2, and those above them may use, rounded up."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            group = mount / path.lstrip(
                "/"
            )  # in a container some paths are the host's, and only the mount's root is here
            for folder in (group, *group.parents[: len(group.parts) - len(mount.parts)]):
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[int]:
    with suppress(OSError, ValueError, ZeroDivisionError):
        if (folder / "cpu.max").exists():
            quota, period = map(float, (folder / "cpu.max").read_text(encoding="utf-8").replace("max", "inf").split())
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = (float((folder / name).read_text(encoding="utf-8")) for name in names)
        if 0 < quota < math.inf:
            yield math.ceil(quota / period)
