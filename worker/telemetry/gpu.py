"""The GPUs' memory and utilization, asked of NVML at every scrape; without a GPU there is nothing to tell."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pynvml
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector


class GpuCollector(Collector):
    """Metrics of every GPU that the driver shows; `nvml` is the library, initialized."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield one family for each figure, a sample for each GPU."""
        used = GaugeMetricFamily("worker_gpu_memory_used_bytes", "Memory in use.", labels=["gpu"])
        total = GaugeMetricFamily("worker_gpu_memory_total_bytes", "Memory.", labels=["gpu"])
        busy = GaugeMetricFamily("worker_gpu_utilization_ratio", "Share of time in which a kernel ran.", labels=["gpu"])
        # Not every GPU tells every figure, and one that has fallen off the bus tells none: what is there is told.
        with suppress(pynvml.NVMLError):
            for index in range(self._nvml.nvmlDeviceGetCount()):
                device = self._nvml.nvmlDeviceGetHandleByIndex(index)
                with suppress(pynvml.NVMLError):
                    memory = self._nvml.nvmlDeviceGetMemoryInfo(device)
                    used.add_metric([str(index)], memory.used)
                    total.add_metric([str(index)], memory.total)
                with suppress(pynvml.NVMLError):
                    busy.add_metric([str(index)], self._nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)
        yield from (used, total, busy)


def installed() -> list[dict[str, Any]]:
    """Return every GPU's name, and its memory, all of it and what is free, in bytes. No CUDA context is made."""
    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        memory = [(device, pynvml.nvmlDeviceGetMemoryInfo(device)) for device in devices]
        return [
            {"name": pynvml.nvmlDeviceGetName(device), "memory": info.total, "free": info.free}
            for device, info in memory
        ]
    except pynvml.NVMLError:
        return []


def visible(environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return those of the GPUs that a process may use, in its order; all where that is not told by numbers."""
    every = installed()
    named = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not all(name.strip().isdigit() for name in named):
        return every
    return [every[int(name)] for name in named if int(name) < len(every)]


def driver() -> str | None:
    """Return the driver's version; None without one."""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def register(registry: CollectorRegistry = REGISTRY) -> None:
    """Add the GPUs' metrics to the registry where there is a driver."""
    if installed():
        registry.register(GpuCollector())
