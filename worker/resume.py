"""Notices that the worker was frozen, and takes the frozen time out of its time limits.

RunPod's FlashBoot freezes idle workers and resumes them later. Then the clocks have jumped, and every connection may be
dead without a sign.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

TICK_SECONDS = 0.05
FROZEN_SECONDS = 2.0
"""A worker whose event loop did not run for so long counts as frozen, unless the process was busy meanwhile."""
KEPT_FREEZES = 100

log = logging.getLogger(__name__)


class Resumes:
    """The resumes of one worker. Without `watched`, it notices none. Use it in the loop that serves."""

    def __init__(
        self, wall_clock: Callable[[], float] = time.time, cpu_clock: Callable[[], float] = time.process_time
    ) -> None:
        self.frozen_seconds = 0.0
        """By how much freezes have moved the monotonic clock, which is also the clock of event loops."""
        self._wall_clock = wall_clock
        self._cpu_clock = cpu_clock
        self._freezes: deque[tuple[float, float]] = deque(maxlen=KEPT_FREEZES)
        """The last freezes: when they began, in seconds since the epoch, and how long they were."""
        self._timeouts: dict[asyncio.Timeout, float | None] = {}
        self._listeners: list[Callable[[], object]] = []

    def listen(self, listener: Callable[[], object]) -> None:
        """Call `listener` at every resume."""
        self._listeners.append(listener)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the running event loop within the block.

        Ticks are callbacks of timers, not a task: those that are due run in the order of their times. So after a freeze
        the tick moves the timeouts before they end anything.
        """
        loop = asyncio.get_running_loop()
        handle: asyncio.TimerHandle | None = None

        def ahead() -> float:
            """Return how far the wall clock is ahead. Only this clock jumps if a checkpoint is restored."""
            return self._wall_clock() - loop.time()

        def tick(due: float, ahead_before: float, cpu_before: float) -> None:
            late, gained, used = loop.time() - due, ahead() - ahead_before, self._cpu_clock() - cpu_before
            if max(late - used, gained) >= FROZEN_SECONDS:
                self.resumed(max(late, 0.0), max(gained, 0.0))
            wait()

        def wait() -> None:
            nonlocal handle
            due = loop.time() + TICK_SECONDS
            handle = loop.call_at(due, tick, due, ahead(), self._cpu_clock())

        wait()
        try:
            yield
        finally:
            if handle is not None:
                handle.cancel()

    def resumed(self, late: float, gained: float = 0.0) -> None:
        """Note a freeze that ends now.

        The monotonic clock has jumped by `late` seconds, and the wall clock by `gained` more.
        """
        seconds = late + gained
        log.info("The worker resumed after it was frozen for %.1f s", seconds)
        self.frozen_seconds += late
        self._freezes.append((self._wall_clock() - seconds, seconds))
        now = asyncio.get_running_loop().time()
        for timeout, rest in self._timeouts.items():
            if (when := timeout.when()) is not None and not timeout.expired():
                timeout.reschedule(when + late if rest is None else min(when + late, now + rest))
        for listener in self._listeners:
            listener()

    def timeout(self, seconds: float, after_resume: float | None = None) -> "_Timeout":
        """Raise `TimeoutError` after so many seconds in which the worker was not frozen.

        After a resume, at most `after_resume` seconds are left: for those who wait for a connection that may be dead.
        """
        return _Timeout(self._timeouts, seconds, after_resume)

    def frozen(self, since: float, until: float) -> float:
        """Return for how many seconds the worker was frozen in this time, in seconds since the epoch."""
        return sum(seconds for began, seconds in self._freezes if since <= began < until)


class _Timeout:
    """A context manager like that of `asyncio.timeout`, which is listed while it runs."""

    __slots__ = ("_after_resume", "_seconds", "_timeout", "_timeouts")

    def __init__(
        self, timeouts: dict[asyncio.Timeout, float | None], seconds: float, after_resume: float | None
    ) -> None:
        self._timeouts = timeouts
        self._seconds = seconds
        self._after_resume = after_resume

    async def __aenter__(self) -> None:
        self._timeout = asyncio.timeout(self._seconds)
        await self._timeout.__aenter__()
        self._timeouts[self._timeout] = self._after_resume

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self._timeouts[self._timeout]
        await self._timeout.__aexit__(kind, error, traceback)
