"""How a batch shares the engine with the requests of callers who wait. Pure but for the functions that it is given."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from worker.memory import Budget
from worker.telemetry.jobs import Telemetry
from worker.telemetry.usage import EngineLoad

QUIET_SECONDS = 10.0
"""So long after the last request of a caller the batch takes the whole engine again."""
AHEAD = 16
"""Alone, a 16th more lines than the engine runs wait in it, so that several that end together are replaced."""
FIFTH = 5
"""While callers wait, there is one line for five of them: a step of the engine then takes at most a fifth longer."""
FEW = 128
"""And one line for 128 places of the engine, since more places mean a faster engine. So a batch never stops."""


@dataclass(frozen=True, slots=True)
class Share:
    """How many lines may be in flight."""

    telemetry: Telemetry
    memory: Budget
    load: Callable[[], EngineLoad]
    """Returns what the engine does now."""
    most: int | None = None
    """The most lines in flight. None: twice as many as the engine runs, since some are being fetched and decoded."""

    def lines(self, most: int | None = None) -> int:
        """Return how many lines may be in flight now, at most `most`; at least one, so that a batch always goes on."""
        load = self.load()
        capacity = load.capacity
        most = min(most or sys.maxsize, self.most or 2 * capacity)
        if self.memory.held > self.memory.limit // 2:
            # Callers need memory for their requests, too.
            return 1
        if self.telemetry.quiet_seconds < QUIET_SECONDS:
            callers = self.telemetry.running - self.telemetry.lines
            return min(max(callers // FIFTH, capacity // FEW, 1), most)
        # Lines that are being fetched and decoded are in flight, and not in the engine.
        return most if load.requests < capacity + max(capacity // AHEAD, 4) else 1


def without_lines(load: EngineLoad, lines: int) -> EngineLoad:
    """Return the load of callers alone: `lines` of a batch make room for them. Lines that wait are taken out first."""
    if not lines:
        return load
    requests, waiting = max(load.requests - lines, 0), max(load.waiting - lines, 0)
    kv_cache = load.kv_cache * requests / load.requests if load.requests else 0.0
    return replace(load, requests=requests, waiting=waiting, running=requests - waiting, kv_cache=kv_cache)
