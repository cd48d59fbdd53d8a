"""GPU memory and utilization from NVML, the driver's library. Creates no CUDA context."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pynvml
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector


class GpuCollector(Collector):
    """Metrics of all GPUs, read at every scrape. `nvml` is the initialized library."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield one family for each metric, with a sample for each GPU."""
        used = GaugeMetricFamily("worker_gpu_memory_used_bytes", "Memory in use.", labels=["gpu"])
        total = GaugeMetricFamily("worker_gpu_memory_total_bytes", "Memory.", labels=["gpu"])
        busy = GaugeMetricFamily("worker_gpu_utilization_ratio", "Share of time in which a kernel ran.", labels=["gpu"])
        # Some GPUs lack a metric, and a failed GPU has none. The other samples are still exported.
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
    """Return the `name` of every GPU, and its `memory` and `free` memory in bytes."""
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


def visible(numbers: tuple[int, ...] | None) -> list[dict[str, Any]]:
    """Return the GPUs with these numbers, in this order; None: all GPUs."""
    gpus = installed()
    return gpus if numbers is None else [gpus[number] for number in numbers if number < len(gpus)]


def driver() -> str | None:
    """Return the version of the driver, or None without a driver."""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def register(registry: CollectorRegistry = REGISTRY) -> None:
    """Add the GPU metrics to the registry, if there are GPUs."""
    if installed():
        registry.register(GpuCollector())
