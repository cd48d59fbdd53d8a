"""A worker that can never start tells its callers why, for a while, instead of leaving while their jobs wait."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from worker.errors import ConfigurationError
from worker.queue.handler import Handler, Job, Output

SECONDS = 600.0
JOBS = 100
"""How long, and to how many: more would only cost money."""


class Refusal:
    """Ends with the error itself, once enough has been said."""

    def __init__(self, error: ConfigurationError, seconds: float = SECONDS, jobs: int = JOBS) -> None:
        self._error = error
        self.why = str(error)
        self._seconds = seconds
        self._left = jobs
        self._enough = asyncio.Event()

    async def given_up(self) -> None:
        """Wait until enough has been said.

        Raises:
            ConfigurationError: always.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                await self._enough.wait()
        raise self._error

    def counted(self, handler: Handler) -> Handler:
        """Return the handler, whose jobs are counted."""

        async def counted(job: Job) -> AsyncGenerator[Output, None]:
            try:
                async with aclosing(handler(job)) as outputs:
                    async for output in outputs:
                        yield output
            finally:
                # Whoever reads a job's error asks for nothing more.
                self._left -= 1
                if self._left <= 0:
                    self._enough.set()

        return counted
