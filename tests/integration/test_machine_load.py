"""The load of a machine has MLflow's own names; its import starts a process."""

from __future__ import annotations

from pathlib import Path

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

from warm_dist.tracking.machine_load import MachineLoad


def test_the_figures_have_the_names_that_mlflow_draws() -> None:
    theirs = CPUMonitor()
    theirs.collect_metrics()
    assert set(theirs.aggregate_metrics()) <= set(MachineLoad(Path()).read())
