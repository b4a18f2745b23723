"""What a sweep tells Ray's scheduler: what is better, when trials are compared, and what earlier trials came to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.spaces import sweep
from warm_dist.sweeps.tune import _scheduler

NIMG = 3200  # of the first comparison


@pytest.mark.parametrize(
    ("nimg", "distance", "decision"),
    [(NIMG, 15.0, "CONTINUE"), (NIMG, 25.0, "STOP"), (NIMG - 1, 99.0, "CONTINUE")],
    ids=["among the better half", "among the worse half", "too early to tell"],
)
def test_half_of_the_trials_go_on_by_the_lower_distance(nimg: int, distance: float, decision: str) -> None:
    """Fault: the worst trials are trained to the end, or a resumed sweep compares the new ones with nothing."""
    settings = sweep({}, scheduler={"kind": "asha", "grace_nimg": NIMG, "reduction_factor": 2})
    new: Any = SimpleNamespace(name="new", config=SimpleNamespace(train=SimpleNamespace(total_nimg=4 * NIMG)))
    known = {"a": 10.0, "b": 20.0, "c": 30.0}
    record: Any = SimpleNamespace(
        read=lambda path, schema: SimpleNamespace(trials=[*known, "new"]),
        evaluations=lambda name: [{"nimg": NIMG, "frechet": known[name]}],
    )
    asha = _scheduler(settings, [new], record)
    new.trial_id = new.name
    asha.on_trial_add(None, new)
    assert asha.on_trial_result(None, new, {"nimg": nimg, "frechet": distance}) == decision
