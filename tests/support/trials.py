"""The first trial of a sweep's file, and the smallest process that runs one."""

from __future__ import annotations

from pathlib import Path

from warm_dist.config.sweep import SweepConfig, TrialConfig, load_sweep
from warm_dist.sweeps.trials import Trial, trials

ONE = TrialConfig()


def first(path: Path, *overrides: str) -> tuple[SweepConfig, Trial]:
    sweep, base, origins = load_sweep(path, list(overrides))
    return sweep, trials(sweep, base, origins)[0]
