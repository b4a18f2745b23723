"""How many trials of a sweep a job runs at a time."""

from __future__ import annotations

import pytest

from warm_dist.config.sweep import SweepConfig
from warm_dist.kubernetes.jobs import JobSize, _trials_at_once

SIZE = JobSize(nodes=4, gpus=0, processes=8, cpus=1, memory_gib=1)


@pytest.mark.parametrize(("limit", "at_once"), [(None, 8), (3, 3), (9, 8)])
def test_a_sweep_s_own_limit_counts_too(limit: int | None, at_once: int) -> None:
    """Fault: the summary promises as many trials at a time as fit the nodes, although max_concurrent allows fewer."""
    tree = {"base": "b.json", "output": "s3://b/s", "trial": {"cpus_per_process": 4}, "max_concurrent": limit}
    assert _trials_at_once(SweepConfig.model_validate(tree), SIZE) == at_once
