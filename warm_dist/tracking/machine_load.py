"""Measures a machine's load: processors, memory, disk, network, GPUs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any


class MachineLoad:
    """Reads this machine's load, named like MLflow's system metrics.

    folder: on the disk to measure. Figures that a machine does not provide (without /proc/net, for example) are left out.
    """

    def __init__(self, folder: Path) -> None:
        import psutil

        self._psutil, self._folder = psutil, folder
        self._first: Any = None
        self._gpus = _gpus()
        self.read()  # the start of the first interval

    def read(self) -> dict[str, float]:
        """Percentages and megabytes (1e6 bytes): processors since the last call, network since the first."""
        psutil, figures = self._psutil, dict[str, float]()
        missing = OSError, psutil.Error, AttributeError  # AttributeError: psutil returned None
        with suppress(*missing):
            figures["cpu_utilization_percentage"] = psutil.cpu_percent()
        with suppress(*missing):
            memory = psutil.virtual_memory()
            figures["system_memory_usage_megabytes"] = memory.used / 1e6
            figures["system_memory_usage_percentage"] = 100 * memory.used / memory.total
        with suppress(*missing):
            disk = psutil.disk_usage(str(self._folder))
            figures["disk_usage_percentage"] = disk.percent
            figures["disk_available_megabytes"] = disk.free / 1e6
        with suppress(*missing):
            now = psutil.net_io_counters()
            self._first = self._first or now
            figures["network_receive_megabytes"] = (now.bytes_recv - self._first.bytes_recv) / 1e6
            figures["network_transmit_megabytes"] = (now.bytes_sent - self._first.bytes_sent) / 1e6
        for k, gpu in enumerate(self._gpus):
            figures |= {f"gpu_{k}_{name}": value for name, value in _gpu_figures(gpu).items()}
        return {name: round(float(value), 3) for name, value in figures.items()}


def _gpus() -> list[Any]:
    """NVML handles of all GPUs; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(k) for k in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _gpu_figures(gpu: Any) -> dict[str, float]:
    """The figures that this GPU provides; MIG slices, for example, lack some."""
    import pynvml

    figures: dict[str, float] = {}
    with suppress(pynvml.NVMLError):
        held = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        figures["memory_usage_megabytes"] = held.used / 1e6
        figures["memory_usage_percentage"] = 100 * held.used / held.total
    with suppress(pynvml.NVMLError):
        figures["utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
    with suppress(pynvml.NVMLError):
        figures["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return figures
