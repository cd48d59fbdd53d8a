"""How many more jobs a worker asks for: no more than its engine can begin soon, so that workers share a queue."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from worker.telemetry.usage import EngineLoad

AHEAD = 16
"""For every 16 requests that the engine runs, one more job may wait. It takes the place of the next that ends."""
BATCHES = 2
"""How many batches may be on their way into the engine: one travels while the engine begins the other."""
FULL_CACHE = 0.9
"""The share of the KV cache from which on no more jobs are taken."""


@dataclass(frozen=True, slots=True)
class Places:
    """The places for jobs."""

    most: int
    """The most jobs at once."""
    batch: int
    """The most jobs to ask for at once."""
    load: Callable[[], EngineLoad] = EngineLoad
    """Returns what the engine does now."""
    room: Callable[[], int] = lambda: 1_000_000
    """Returns the number of jobs of any size for which there is memory."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the number of free places may have changed."""

    def free(self, jobs: int, starting: int) -> int:
        """Return how many jobs to ask for.

        The worker has `jobs` now; `starting` of them are not in the engine yet.
        """
        load = self.load()
        if load.waiting or load.kv_cache >= FULL_CACHE:
            return 0
        # Requests that the engine has not reported yet may have to wait.
        on_their_way = starting + load.requests - load.running
        engine = load.capacity + load.capacity // AHEAD - load.running
        if load.kv_cache:
            # More requests like those that run now.
            engine = min(engine, max(int(load.running * (1 - load.kv_cache) / load.kv_cache), 1))
        begins = min(BATCHES * self.batch, engine) - on_their_way
        return max(min(self.batch, begins, self.most - jobs, self.room()), 0)
