"""Delivers one job's outputs: each as a part of its stream, then all of them as its result."""

import json
import logging
from collections.abc import Callable
from typing import Any

from worker.errors import ResultRefusedError
from worker.queue.platform import Platform

log = logging.getLogger(__name__)


class Delivery:
    """The outputs of one job. Call its methods one at a time. They raise `JobLostError` once nobody waits for the job.

    `posted` is called for every part of the stream that the platform has taken.
    """

    def __init__(self, platform: Platform, job_id: str, posted: Callable[[], None]) -> None:
        self._platform = platform
        self._job_id = job_id
        self._posted = posted
        self._streams = True
        self.outputs: list[Any] = []

    async def part(self, output: Any) -> None:
        """Post one output, unless an earlier one was refused: a stream with a hole is worse than one that ends."""
        self.outputs.append(output)
        if not self._streams:
            return
        try:
            await self._platform.stream(self._job_id, output)
        except ResultRefusedError as error:
            log.warning("Job %s: the rest comes with the result, not in the stream. %s", self._job_id, error)
            self._streams = False
        else:
            self._posted()

    async def done(self) -> None:
        """Post all outputs as the result."""
        await self._end({"output": self.outputs})

    async def failed(self, reason: str) -> None:
        """Post an error as the result."""
        await self._end({"error": reason})

    async def _end(self, result: dict[str, Any]) -> None:
        """Post a result. If the platform refuses it, the job fails with the reason."""
        try:
            await self._platform.done(self._job_id, result)
        except ResultRefusedError as refusal:
            log.warning("Job %s fails: %s", self._job_id, refusal)
            try:
                await self._platform.done(self._job_id, {"error": json.dumps(refusal.error())})
            except ResultRefusedError as error:
                log.error("Job %s has no result: its error was refused too: %s", self._job_id, error)
