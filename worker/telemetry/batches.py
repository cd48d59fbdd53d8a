"""Metrics of batches, and the state of the batch that runs, for `/health`."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from worker.errors import Json


class BatchTelemetry:
    """What is known about the batch that runs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.current: Json | None = None
        """The progress of the batch that runs; None without one."""
        self._lines = Counter("worker_batch_lines", "Lines of batches that have ended.", ["outcome"], registry=registry)
        gauges = {
            "total": "Lines of the batch that runs; 0 until they were counted.",
            "done": "Lines of the batch that runs that have ended.",
            "seconds_left": "Time that the batch that runs still takes, as far as known.",
        }
        for name, text in gauges.items():
            gauge = Gauge(f"worker_batch_{name}", text, registry=registry)
            gauge.set_function(lambda name=name: float((self.current or {}).get(name) or 0))  # type: ignore[misc]

    def ended(self, completed: int, failed: int) -> None:
        """Count lines that have ended since the last call."""
        self._lines.labels("completed").inc(completed)
        self._lines.labels("failed").inc(failed)
