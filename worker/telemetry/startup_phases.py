"""The seconds that each phase of the start took."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

log = logging.getLogger(__name__)


class Ledger:
    """Phases in the order in which they ended, each told once in the log and kept as a metric."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.seconds: dict[str, float] = {}
        self._gauge = Gauge("worker_startup_seconds", "Time of a phase of the start.", ["phase"], registry=registry)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Enter the time of the block, also when it fails."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.enter(name, time.monotonic() - began)

    def enter(self, name: str, seconds: float) -> None:
        """Enter a phase whose time is known."""
        self.seconds[name] = round(seconds, 3)
        self._gauge.labels(name).set(seconds)
        log.info("Start: %s took %.3f s", name, seconds, extra={"phase": name, "seconds": round(seconds, 3)})

    def tell(self, **about: object) -> None:
        """Tell all phases in one line, once the worker is ready, and what else is worth knowing of the start."""
        log.info("Ready after %.3f s", self.seconds["total"], extra={"startup_seconds": dict(self.seconds), **about})
