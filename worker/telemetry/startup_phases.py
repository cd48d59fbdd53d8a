"""The duration of each phase of the start."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

log = logging.getLogger(__name__)


class StartupPhases:
    """Phases in the order in which they ended. Each is logged once and kept as a metric."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.seconds: dict[str, float] = {}
        self._gauge = Gauge("worker_startup_seconds", "Duration of a phase of the start.", ["phase"], registry=registry)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block, also when it fails."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add the known duration of a phase, or of another part of it."""
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 3)
        self._gauge.labels(name).inc(seconds)
        log.info("Start: %s took %.3f s", name, seconds, extra={"phase": name, "seconds": round(seconds, 3)})

    def report(self, **details: object) -> None:
        """Log all phases in one line, with details of the start, once the worker is ready."""
        log.info("Ready after %.3f s", self.seconds["total"], extra={"startup_seconds": dict(self.seconds), **details})
