"""The load of a machine, under MLflow's names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.tiny_run import config
from warm_dist.distributed.world import World
from warm_dist.tracking import machine_load
from warm_dist.tracking.machine_load import MachineLoad
from warm_dist.training import step_metrics
from warm_dist.training.step_metrics import StepMetrics


def test_a_machine_tells_what_it_does() -> None:
    """Fault: a figure is missing, or the load of the processors is always 0."""
    meter = MachineLoad(Path())
    sum(range(3_000_000))  # some work between the two calls
    figures = meter.read()
    assert 0 < figures["cpu_utilization_percentage"] <= 100
    assert 0 < figures["system_memory_usage_percentage"] < 100
    assert figures["system_memory_usage_megabytes"] > 100
    assert 0 < figures["disk_usage_percentage"] <= 100
    assert figures["network_receive_megabytes"] >= 0


def test_what_a_machine_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    def missing() -> None:
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(psutil, "net_io_counters", lambda: None)
    monkeypatch.setattr(psutil, "virtual_memory", missing)
    monkeypatch.setattr(machine_load, "_gpus", list)
    names = MachineLoad(Path("nowhere")).read().keys()
    assert names == {"cpu_utilization_percentage"}


def test_gpus_tell_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML as a stand-in: the second GPU refuses to tell its power, as a MIG slice does.

    Fault: one figure that is refused hides all others.
    """
    import pynvml

    def power(gpu: int) -> int:
        if gpu:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 350_000

    monkeypatch.setattr(machine_load, "_gpus", lambda: [0, 1])
    memory = SimpleNamespace(used=2e9, total=8e9)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda gpu: memory)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda gpu: SimpleNamespace(gpu=97))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", power)
    figures = {name: value for name, value in MachineLoad(Path()).read().items() if name.startswith("gpu")}
    each = {"memory_usage_megabytes": 2000, "memory_usage_percentage": 25, "utilization_percentage": 97}
    expected: dict[str, Any] = {f"gpu_{k}_{name}": value for k in (0, 1) for name, value in each.items()}
    assert figures == expected | {"gpu_0_power_usage_watts": 350}


def test_several_machines_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = StepMetrics(config(tmp_path), World(0, 1, torch.device("cpu"), None), print)
    assert "cpu_utilization_percentage" in alone.machines()
    monkeypatch.setattr(step_metrics, "gather", lambda world, mine: [{"cpu": 1.0}, None, {"cpu": 3.0}, None])
    assert alone.machines() == {"node_0/cpu": 1.0, "node_1/cpu": 3.0}
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert StepMetrics(config(tmp_path), World(0, 1, torch.device("cpu"), None), print).meter is None
